"""Where a module's matrix lies in stored tensors: regions of them, decoded where quantised, and a view of those."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from safeshard.manifests.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    from safeshard.kernels.alignment.coded import Coded
    from safeshard.streamer.inputs.codecs.base import Codec

Range = tuple[int, int, int]  # start, stop, step


@dataclass(frozen=True)
class View:
    """Some rows or columns of a matrix, then transposed or not; None means all of them."""

    rows: Range | None = None
    columns: Range | None = None
    transposed: bool = False

    def of(self, matrix: Tensor) -> Tensor:
        """The part of a matrix that is seen; it shares the matrix's memory."""
        seen = matrix[slice(*self.rows)] if self.rows else matrix
        seen = seen[:, slice(*self.columns)] if self.columns else seen
        return seen.T if self.transposed else seen

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of what is seen of a matrix of `rows` x `columns`."""
        seen = (len(range(*self.rows)) if self.rows else rows, len(range(*self.columns)) if self.columns else columns)
        return seen[::-1] if self.transposed else seen


WHOLE = View()
WHOLE_ROWS: Range = (0, 0, 1)


@dataclass(frozen=True)
class Part:
    """A matrix seen in a region of a stored tensor; of a quantised one in a region of each of its tensors.

    `refs` are the regions ("values" and, with a codec, "scales") under their tensors' names, `starts` where each begins
    in its tensor, in bytes. `stored` are the rows and columns of what lies there, decoded.
    """

    refs: Mapping[str, TensorRef]
    stored: tuple[int, int]
    codec: Codec | None = None
    view: View = WHOLE
    starts: Mapping[str, int] = field(default_factory=dict)

    @property
    def ref(self) -> TensorRef:
        """The region that holds the values."""
        return self.refs["values"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.shape(*self.stored)

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def dtype(self) -> str:
        """The safetensors dtype that its values have once they are decoded."""
        return "F32" if self.codec else self.ref.dtype

    @property
    def block(self) -> Hashable:
        """Equal for parts of one region."""
        return (self.ref.file, self.ref.name, self.ref.offset, self.ref.nbytes)

    def start(self, part: str = "values") -> int:
        """Where a region begins in its tensor, in bytes."""
        return self.starts.get(part, 0)

    def matrix(self, load: Callable[[TensorRef], Tensor]) -> Tensor:
        """All that lies in the region, decoded: rows x columns as stored."""
        if self.codec is None:
            return load(self.ref).view(self.stored)
        return self.codec.decode({part: load(ref) for part, ref in self.refs.items()})

    @property
    def in_codes(self) -> bool:
        """Whether `coded` gives what is seen of a quantised matrix: whole rows, of whole blocks."""
        if self.codec is None or not self.codec.in_codes(self.ref.dtype) or self.view.columns or self.view.transposed:
            return False
        start, _, step = self.view.rows or WHOLE_ROWS
        height = self.codec.block(self.stored)[0]
        return height == 1 or height >= self.stored[0] or (step == 1 and start % height == 0)

    def coded(self, load: Callable[[TensorRef], Tensor]) -> Coded:
        """What is seen of a quantised matrix, in its codes."""
        assert self.codec is not None
        whole = self.codec.coded({part: load(ref) for part, ref in self.refs.items()})
        return whole if self.view.rows is None else whole.rows(*self.view.rows)

    def rows(self, start: int, stop: int) -> Part:
        """Some rows of what is stored, not quantised: a smaller region."""
        assert self.codec is None
        skipped = start * (self.ref.nbytes // self.stored[0])
        nbytes = (stop - start) * (self.ref.nbytes // self.stored[0])
        shape = (stop - start, self.stored[1])
        ref = replace(self.ref, shape=shape, offset=self.ref.offset + skipped, nbytes=nbytes)
        return replace(self, refs={"values": ref}, stored=shape, starts={"values": self.start() + skipped})


@dataclass(frozen=True)
class Stored:
    """A module's weight, O x I, by where it is stored: parts one below the other."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        """The tensor that it lies in, or the first of them."""
        return self.parts[0].name

    @property
    def dtype(self) -> str:
        """The safetensors dtype of its values once they are decoded."""
        return self.parts[0].dtype

    @property
    def ref(self) -> TensorRef:
        """The region of its values, or of the first part's."""
        return self.parts[0].ref

    @property
    def names(self) -> set[str]:
        """Every tensor that it lies in."""
        return {ref.name for ref in self.refs()}

    @property
    def encoded(self) -> bool:
        """Whether it is quantised."""
        return self.parts[0].codec is not None

    @property
    def in_codes(self) -> bool:
        """Whether it can be multiplied with as it is stored, though it is quantised."""
        return len(self.parts) == 1 and self.parts[0].in_codes

    @property
    def is_tensor(self) -> bool:
        """Whether a plain tensor holds it and nothing else, O x I or I x O."""
        first = self.parts[0]
        return len(self.parts) == 1 and not (first.codec or first.starts or first.view.rows or first.view.columns)

    @property
    def transposed(self) -> bool:
        """Whether it is stored in x out."""
        return self.parts[0].view.transposed

    @property
    def key(self) -> Hashable:
        """Equal for equal places."""
        return tuple((part.block, part.view) for part in self.parts)

    def refs(self) -> Iterator[TensorRef]:
        """Every region to read."""
        for part in self.parts:
            yield from part.refs.values()


def plain(ref: TensorRef, transposed: bool = False) -> Stored:
    """A weight that is a tensor; one that is not 2-D counts as one row."""
    rows, columns = ref.shape if len(ref.shape) == 2 else (1, ref.numel)
    return Stored((Part({"values": ref}, (rows, columns), view=View(transposed=transposed)),))
