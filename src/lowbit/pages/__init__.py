"""Pages and pictures of methods, made by running the methods themselves."""

from typing import TYPE_CHECKING

from lowbit.lazy import lazy_imports

if TYPE_CHECKING:
    from lowbit.pages.page import method_page, write_method_pages
    from lowbit.pages.picture import method_picture

__all__ = ["method_page", "method_picture", "write_method_pages"]

__getattr__, __dir__ = lazy_imports(__name__)
