"""What a card can do at most by its data sheet, and how long a kernel takes there at best.

Nothing here is measured: printed beside what is, it shows at the first run on a card where a kernel falls short.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARES = {"memory": 0.8, "matrix": 0.6}  # of the rates below, what the kernels are to reach


@dataclass(frozen=True)
class Card:
    """Dense rates of a data sheet: bytes and operations a second."""

    name: str
    memory: float
    bf16: float
    tf32: float
    fp32: float


def _card(name: str, *tera: float) -> Card:
    return Card(name, *(rate * 1e12 for rate in tera))


# TB/s, and TFLOP/s of bf16 (with fp32 sums), TF32 (AMD: fp32 matrix instructions) and fp32 without tensor cores. The
# first whose words all are in a device's name is taken.
CARDS = (
    _card("B200", 8.0, 2250, 1100, 75),
    _card("H200", 4.8, 989, 494, 67),
    _card("H100 PCIe", 2.0, 756, 378, 51),
    _card("H100", 3.35, 989, 494, 67),
    _card("A100 40GB", 1.555, 312, 156, 19.5),
    _card("A100", 2.039, 312, 156, 19.5),
    _card("L40S", 0.864, 362, 183, 91.6),
    _card("RTX 4090", 1.008, 165, 82.6, 82.6),
    _card("RTX 3090", 0.936, 71, 35.6, 35.6),
    _card("MI300X", 5.3, 1307, 163.4, 163.4),
)


def find(device_name: str) -> Card | None:
    """The card of a device's name, as its driver gives it."""
    return next((card for card in CARDS if all(word in device_name for word in card.name.split())), None)


@dataclass(frozen=True)
class Bound:
    """The least seconds of one call, and what binds it."""

    memory: float
    matrix: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.matrix)

    @property
    def by(self) -> str:
        return "memory" if self.memory >= self.matrix else "matrix"

    @property
    def share(self) -> float:
        """Of the bound, what is to be reached."""
        return SHARES[self.by]

    def __str__(self) -> str:
        times = f"memory {1e3 * self.memory:.3f} ms, matrix units {1e3 * self.matrix:.3f} ms"
        return f"{times}: at best {1e3 * self.seconds:.3f} ms ({self.by})"


def bound(card: Card, operation: str, rows: int, columns: int, wide: int, tokens: int) -> Bound | None:
    """The bound of an operation on bf16 weights, as the kernels do it; None where no single kernel does.

    Args:
        rows, columns: O and I of a weight; a Gram has I x I.
        wide: columns of all factors B together.
        tokens: of a Gram.
    """
    size = rows * columns
    if operation in ("projection", "gate"):
        # Two passes over both weights; each product is three of TF32, where fp32 itself is not a matrix instruction.
        products = 3 if card.tf32 > card.fp32 else 1
        return Bound((8 * size + 8 * wide * (rows + columns)) / card.memory, products * 4 * size * wide / card.tf32)
    if operation == "gram":  # of bf16 inputs, the upper half; read and written
        return Bound((2 * tokens * columns + 4 * columns**2) / card.memory, tokens * columns**2 / card.bf16)
    if operation == "merge":
        return Bound(16 * size / card.memory, 0.0)  # bf16 in, fp32 out, read back and written for the second
    return None
