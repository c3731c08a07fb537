from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from lowbit.errors import FileFormatError
from lowbit.formats.packed.tensor import PackedTensor, packed_tensor_from
from lowbit.quantizers import (
    BinaryQuantizer,
    CodebookQuantizer,
    PowerOfTwoQuantizer,
    QTensor,
    Quantizer,
    SumQuantizer,
    UniformQuantizer,
)
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.spec import Granularity

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
GRANULARITIES = [
    Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(9), Granularity.group(12), Granularity.over(0, -3),
]  # fmt: skip

Make = Callable[[int, Granularity], Quantizer]
KINDS: dict[str, tuple[range, Make]] = {
    "symmetric": (range(2, 9), lambda b, g: UniformQuantizer(b, signed=True, symmetric=True, granularity=g)),
    "affine": (range(1, 9), lambda b, g: UniformQuantizer(b, signed=False, symmetric=False, granularity=g)),
    "signed_affine": (range(1, 9), lambda b, g: UniformQuantizer(b, signed=True, symmetric=False, granularity=g)),
    "binary": (range(1, 2), lambda b, g: BinaryQuantizer(granularity=g)),
    "codebook": (range(1, 9), lambda b, g: CodebookQuantizer(b, granularity=g)),
    "power_of_two": (range(2, 9), lambda b, g: PowerOfTwoQuantizer(b, granularity=g)),
    "sum_of_binary": (range(1, 2), lambda b, g: SumQuantizer([BinaryQuantizer(granularity=g) for _ in range(3)])),
    "sum_of_affine": (
        range(1, 9),
        lambda b, g: SumQuantizer([UniformQuantizer(b, signed=False, symmetric=False, granularity=g) for _ in range(2)]),
    ),
}
ALL = [(kind, bit_width) for kind, (bit_widths, _) in KINDS.items() for bit_width in bit_widths]


def encoded(kind: str, bit_width: int, granularity: Granularity) -> QTensor:
    quantizer = KINDS[kind][1](bit_width, granularity)
    quantizer.initialize(WEIGHT)
    return quantizer.encode(WEIGHT)


def reread(tensor: PackedTensor) -> PackedTensor:
    return packed_tensor_from("w", tensor.describe(), tensor.packed, tensor.stored_tables())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: f"{g}-{g.axis}")
@pytest.mark.parametrize(("kind", "bit_width"), ALL)
def test_every_kind_granularity_and_width_decodes_to_the_same_bits_again(kind: str, bit_width: int, granularity: Granularity) -> None:
    codes = encoded(kind, bit_width, granularity)
    packed = PackedTensor.of(codes)
    again = reread(packed)
    assert torch.equal(again.decode(), codes.decode())
    assert torch.equal(again.unpack().codes.short(), codes.codes.short())
    assert again.unpack().bit_width == bit_width
    assert again.decoded_shape == WEIGHT.shape
    assert packed.code_bytes == packed.packed.numel() == -(-codes.codes.numel() * bit_width // 8)


@pytest.mark.parametrize("bit_width", range(2, 9))
def test_codes_at_both_ends_of_their_range_survive(bit_width: int) -> None:
    ends = torch.tensor([-(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1, 0], dtype=torch.int8)
    decoder = AffineDecoder(torch.tensor(0.5), torch.tensor(0.0), Granularity.tensor())
    again = reread(PackedTensor.of(QTensor(ends, decoder, bit_width)))
    assert again.decode().tolist() == (ends * 0.5).tolist()


def test_tables_are_stored_as_small_as_they_are() -> None:
    symmetric = PackedTensor.of(encoded("symmetric", 4, Granularity.channel(0)))
    assert {name: table.dtype for name, table in symmetric.stored_tables().items()} == {"scale": torch.float32}
    assert symmetric.table_bytes == 6 * 4
    affine = PackedTensor.of(encoded("affine", 4, Granularity.channel(0)))
    assert affine.stored_tables()["zero_point"].dtype == torch.uint8
    assert affine.table_bytes == 6 * 4 + 6
    decoder = AffineDecoder(torch.tensor(0.5), torch.tensor(-3.0), Granularity.tensor())
    negative = PackedTensor.of(QTensor(torch.zeros(8, dtype=torch.int8), decoder, 4))
    assert negative.stored_tables()["zero_point"].dtype == torch.int8
    between = AffineDecoder(torch.tensor(0.5), torch.tensor(1.25), Granularity.tensor())
    kept = PackedTensor.of(QTensor(torch.zeros(8, dtype=torch.int8), between, 4))
    assert kept.stored_tables()["zero_point"].item() == 1.25
    assert reread(kept).decode().tolist() == [-0.625] * 8


def test_a_tensor_without_elements_is_packed_into_no_bytes() -> None:
    decoder = AffineDecoder(torch.tensor(1.0), torch.tensor(0.0), Granularity.tensor())
    packed = PackedTensor.of(QTensor(torch.zeros(0, 3, dtype=torch.uint8), decoder, 3))
    assert packed.code_bytes == 0
    assert reread(packed).decode().shape == (0, 3)


def refusal(changes: Mapping[str, object], tables: Mapping[str, Tensor] | None = None, kind: str = "affine") -> str:
    """Why a tensor of that kind, per channel, is refused with these entries of its description and these tables."""
    packed = PackedTensor.of(encoded(kind, 1 if kind == "binary" else 3, Granularity.channel(0)))
    with pytest.raises(FileFormatError) as caught:
        packed_tensor_from("w", {**packed.describe(), **changes}, packed.packed, {**packed.stored_tables(), **(tables or {})})
    text = str(caught.value)
    assert text.startswith("tensor 'w': ")
    assert text.count("tensor 'w'") == 1
    return text.removeprefix("tensor 'w': ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [6, 4, 3, 4]}, "288 codes of 3 bits need 108 bytes, the file contains torch.uint8 of shape (81,)"),
        ({"shape": [2**39, 2**39]}, f"{2**78} codes of 3 bits need {2**78 * 3 // 8} bytes"),
        ({"shape": [216.0]}, "its shape must be a list of up to 16 sizes"),
        ({"shape": [[216]]}, "its shape must be a list of up to 16 sizes"),
        ({"shape": [216]}, "table 'scale' must have the shape (216,), got (6, 1, 1, 1)"),
        ({"shape": [4, 6, 3, 3]}, "table 'scale' must have the shape (4, 1, 1, 1), got (6, 1, 1, 1)"),
        ({"bit_width": 4}, "216 codes of 4 bits need 108 bytes"),
        ({"bit_width": True}, "its bit_width must be from 1 to 8, got True"),
        ({"bit_width": 9}, "its bit_width must be from 1 to 8, got 9"),
        ({"bit_width": "3"}, "its bit_width must be from 1 to 8, got 3"),
        ({"offset": -3}, "its offset must be 0 or -4, got -3"),
        ({"offset": None}, "its offset must be 0 or -4, got None"),
        ({"decoder": "pickle"}, "unknown decoder 'pickle'"),
        ({"decoder": 3}, "cannot understand its decoder"),
        ({"decoder": "codebook"}, "decoder 'codebook': table 'levels' is missing"),
        ({"decoder": "binary"}, "its decoder 'binary' has no table 'zero_point'"),
        ({"decoder": "sum", "parts": []}, "unknown decoder 'sum'"),
        ({"decoder": "sum", "parts": ["sum"]}, "unknown decoder 'sum'"),
        ({"decoder": "sum", "parts": ["affine"] * 65}, "the parts of its decoder must be up to 64 names"),
        ({"parts": None}, "cannot understand its decoder"),
        ({"granularity": "per_row"}, "unknown granularity 'per_row'"),
        ({"granularity": "group:0"}, "group size must be at least 1, got 0"),
        ({"granularity": "group:7"}, "group size 7 does not divide the 36 weights"),
        ({"granularity": "group:\u00b2"}, "invalid literal"),
        ({"granularity": f"group:{9:05000}"}, "Exceeds the limit"),
        ({"axis": 4}, "axis 4 does not exist in shape (6, 4, 3, 3)"),
        ({"axis": -1}, "axis -1 does not exist in shape (6, 4, 3, 3)"),
        ({"axis": 1}, "table 'scale' must have the shape (1, 4, 1, 1), got (6, 1, 1, 1)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_description_that_contradicts_the_tensors_is_refused(changes: dict[str, object], reason: str) -> None:
    assert refusal(changes).startswith(reason)


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"scale": torch.ones(5, 1, 1, 1)}, "table 'scale' must have the shape (6, 1, 1, 1), got (5, 1, 1, 1)"),
        ({"scale": torch.ones(6, 4, 3, 3)}, "table 'scale' must have the shape (6, 1, 1, 1), got (6, 4, 3, 3)"),
        ({"zero_point": torch.ones(6)}, "table 'zero_point' must have the shape (6, 1, 1, 1), got (6,)"),
        ({"scale": torch.full((6, 1, 1, 1), torch.nan)}, "table 'scale' contains values that are not finite"),
        ({"scale": torch.full((6, 1, 1, 1), torch.inf)}, "table 'scale' contains values that are not finite"),
        ({"scale": torch.ones(6, 1, 1, 1, dtype=torch.int32)}, "table 'scale' must be floating point, got torch.int32"),
        ({"levels": torch.ones(6, 8)}, "its decoder 'affine' has no table 'levels'"),
    ],
    ids=range(7),
)
def test_tables_that_do_not_fit_are_refused(tables: dict[str, Tensor], reason: str) -> None:
    assert refusal({}, tables) == reason


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (torch.ones(6, 7), "codes 0..7 lie outside its codebook of 7 levels"),
        (torch.ones(5, 8), "it needs a codebook of 6 rows, got shape (5, 8)"),
        (torch.ones(8), "it needs a codebook of 6 rows, got shape (8,)"),
    ],
    ids=range(3),
)
def test_codes_outside_their_codebook_are_refused(levels: Tensor, reason: str) -> None:
    assert refusal({}, {"levels": levels}, "codebook") == reason


def test_negative_codes_of_a_codebook_are_refused() -> None:
    assert refusal({"offset": -4}, kind="codebook") == "codes -4..3 lie outside its codebook of 8 levels"


def test_a_binary_decoder_takes_one_bit_only() -> None:
    assert refusal({"bit_width": 2, "shape": [6, 2, 3, 3]}, kind="binary") == "a binary decoder has the codes 0 and 1, not 2 bits from 0"
    assert refusal({"offset": -1}, kind="binary") == "a binary decoder has the codes 0 and 1, not 1 bits from -1"


def test_a_sum_needs_codes_for_each_part() -> None:
    parts = ["binary", "binary"]
    tables = {"0.scale": torch.ones(6, 1, 1, 1), "1.scale": torch.ones(6, 1, 1, 1)}
    packed = PackedTensor.of(encoded("sum_of_binary", 1, Granularity.channel(0)))
    with pytest.raises(FileFormatError, match=r"2 parts need codes with that first size, got shape \(3, 6, 4, 3, 3\)"):
        packed_tensor_from("w", packed.describe() | {"parts": parts}, packed.packed, tables)


@pytest.mark.parametrize("description", [None, [], "affine", {}], ids=str)
def test_a_description_that_is_none_is_refused(description: object) -> None:
    with pytest.raises(FileFormatError, match=r"tensor 'w': its (description must be a dict|shape must be a list)"):
        packed_tensor_from("w", description, torch.zeros(1, dtype=torch.uint8), {})
