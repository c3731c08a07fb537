"""The paper of a method as BibTeX, from the facts of its registration."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowbit.registry import MethodInfo


@dataclass(frozen=True)
class Reference:
    """A paper.

    Attributes:
        authors: Their names, in order.
        venue: Conference or journal; empty where there is none.
        year: Year as text; empty where none is known.
    """

    authors: tuple[str, ...]
    venue: str
    year: str

    @staticmethod
    def of(paper: str) -> Reference:
        """From ``MethodInfo.paper``. Where it names several papers with a semicolon, the first counts.

        >>> Reference.of("Lee, Kim, Ham, CVPR 2021")
        Reference(authors=('Lee', 'Kim', 'Ham'), venue='CVPR', year='2021')
        >>> Reference.of("Zhou, Wu 2016")
        Reference(authors=('Zhou', 'Wu'), venue='', year='2016')
        """
        first = paper.partition(";")[0].strip()
        found = re.search(r"\b(?:19|20)\d\d\b", first)
        before = (first[: found.start()] if found else first).rstrip()
        names = tuple(filter(None, before.rstrip(",").split(", ")))
        has_venue = len(names) > 1 and re.search("[A-Z]{2}", names[-1]) is not None  # CVPR, NeurIPS, ACM Multimedia; no name has these
        return Reference(names[:-1] if has_venue else names, names[-1] if has_venue else "", found[0] if found else "")


def bibtex(info: MethodInfo) -> str:
    """The entry of the method's paper under the method's name; empty for methods without a paper of their own.

    >>> from lowbit.registry import get_method
    >>> print(bibtex(get_method("ewgs")), end="")
    @inproceedings{ewgs,
      title = {{Network Quantization with Element-wise Gradient Scaling}},
      author = {Lee and Kim and Ham},
      booktitle = {CVPR},
      year = {2021},
      url = {https://arxiv.org/abs/2104.00903}
    }
    """
    if not info.title or info.fidelity == "baseline":
        return ""
    paper = Reference.of(info.paper)
    fields = {
        "title": f"{{{info.title}}}",
        "author": " and ".join(paper.authors),
        "booktitle": paper.venue,
        "year": paper.year,
        "url": info.url,
    }
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@{'inproceedings' if paper.venue else 'misc'}{{{info.name},\n{body}\n}}\n"
