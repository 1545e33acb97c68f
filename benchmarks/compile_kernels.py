"""Compile every kernel for cards that are not there, and print what each needs.

    python -m benchmarks.compile_kernels                      # every kernel and tile, for sm_80, sm_90 and sm_100
    python -m benchmarks.compile_kernels --arch 90 --dtypes bfloat16 --kernels up linear --matrices int8 int4

Each kernel, tile and card has a line: registers, bytes of spilled registers, shared memory, how many loads are on the
way when the pipeline first waits, bytes of the widest load, and whether the products run on tensor cores. It needs
Triton alone, whose wheel brings the assembler. The exit code is 1 where a kernel does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.kernels.quantized import QuantizedWeight
from core.kernels.triton_ops import gate, products, sort, sums
from core.kernels.triton_ops.environment import MAX_EXPERTS, interpreted
from core.kernels.triton_ops.launch import Launch, jit_function, written_down
from core.kernels.triton_ops.tuning import Tile

ARCHS = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a program may have, from the CUDA C++ programming guide's table of compute capabilities."""
MAX_SPILL = 96
"""Bytes of registers that a thread may spill."""
WIDTHS = {"whole": (2048, 1408), "eights": (2040, 1400), "twos": (2042, 1402), "odd": (2041, 1401)}
"""D and F in whole tiles; in multiples of 8, as ``SwiGLU`` makes them; of even and of odd rows."""
FIRST_WAIT = re.compile(r"ttg\.async_wait\b.*?\bnum = (\d+)")
LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b")
ASYNC_LOAD = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)")
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
PRODUCTS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
"""The dtypes of products; "tf32" is float32 with the tensor cores' own precision."""
MATRICES = ("float", "int8", "int4")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Compiled:
    """The needs of one kernel with one tile on one card.

    Attributes:
        kernel, widths, arch, dtype, tile: what was compiled.
        matrices: one of ``MATRICES``, how the experts' are stored.
        registers: registers of a thread.
        spill: bytes of registers that a thread keeps in memory.
        shared: bytes of shared memory of a program.
        products: whether the kernel multiplies matrices.
        tensor_cores: whether its code has tensor-core instructions.
        in_flight: loads that may still be on the way when the pipeline first waits; None without a pipeline.
        widest: most bytes that a thread loads at a time.
    """

    kernel: str
    widths: str
    arch: int
    dtype: str
    tile: str
    matrices: str
    registers: int
    spill: int
    shared: int
    products: bool
    tensor_cores: bool
    in_flight: int | None
    widest: int

    def wrong(self) -> str | None:
        """Return what does not fit the card, or None."""
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_MEMORY[self.arch]}"
        if self.spill > MAX_SPILL:
            return f"spills {self.spill} bytes of registers, more than {MAX_SPILL}"
        if self.products and self.dtype != "float32" and not self.tensor_cores:
            return "has no tensor-core instruction"
        if self.products and self.in_flight == 0:
            return "waits for all that it loads before each product"
        return None


def launches(
    dtype: torch.dtype, widths: tuple[int, int], *, tokens: int = 32768, num_experts: int = 64, top_k: int = 8
) -> list[Launch]:
    """Return launches of every kernel with the flags that change its code, on tensors of the meta device."""
    E, K, device = num_experts, top_k, torch.device("meta")
    R, T, (D, F) = tokens * K, tokens, widths

    def of(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device=device)

    index_R, offsets_E = of(R, kind=torch.int64), of(E, kind=torch.int32)
    gates_R = of(R, kind=torch.float32)
    x, x_R, hidden_R = of(T, D), of(R, D), of(R, F)
    w, w_out, b_in, b_out = of(E, D, F), of(E, F, D), of(E, F), of(E, D)
    with written_down() as starts:
        products.up(x, index_R, offsets_E, w, None, None, "gelu", R, True)
        products.up(x, index_R, offsets_E, w, w, None, "silu", R, True)
        products.up(x, index_R, offsets_E, w, w, b_in, "gelu", R, True)
        products.up(x_R, None, offsets_E, w, None, b_in, "relu", R, False)
        products.up(x, index_R, offsets_E, w, None, None, "identity", R, True)
        products.up(x, index_R, offsets_E, w, None, None, "gelu_tanh", R, True)
        products.up(of(T, D - 8), index_R, offsets_E, of(E, D - 8, F), None, b_in, "gelu", R, True)
        products.linear(hidden_R, w_out, offsets_E, x_R, bias=b_out, gates_R=gates_R)
        products.linear(hidden_R, w_out, offsets_E, x, gates_R=gates_R, row_index_R=index_R)
        products.linear(hidden_R, w, offsets_E, x_R, transposed=True, clear=True)
        products.linear(hidden_R, w, offsets_E, x_R, transposed=True, second=(hidden_R, w))
        for bits, size in ((8, None), (4, None), (8, 64), (4, 64)):
            into, out = (_quantized(of, E, *shape, bits, size) for shape in ((D, F), (F, D)))
            if into is None or out is None:
                continue  # 64 does not divide the widths
            products.up(x, index_R, offsets_E, into, None, b_in, "gelu", R, False)
            products.up(x, index_R, offsets_E, into, into, None, "silu", R, False)
            products.up(x_R, None, offsets_E, into, into, b_in, "gelu", R, False)
            products.linear(hidden_R, out, offsets_E, x_R, bias=b_out, gates_R=gates_R)
            products.linear(hidden_R, out, offsets_E, x, gates_R=gates_R, row_index_R=index_R)
            products.linear(hidden_R, out, offsets_E, x_R, clear=True)
        products.hidden_grad(x, index_R, offsets_E, gates_R, w_out, b_out, hidden_R, None, "gelu")
        products.hidden_grad(x, index_R, offsets_E, gates_R, w_out, None, hidden_R, hidden_R, "silu")
        products.hidden_grad(x, index_R, offsets_E, gates_R, w_out, None, hidden_R, hidden_R, "gelu")
        products.hidden_grad(x_R, None, offsets_E, gates_R, w_out, b_out, hidden_R, None, "relu")
        products.hidden_grad(x, index_R, offsets_E, gates_R, w_out, None, hidden_R, None, "identity")
        products.hidden_grad(x, index_R, offsets_E, gates_R, w_out, None, hidden_R, None, "gelu_tanh")
        products.hidden_grad(x_R, None, offsets_E, gates_R, w_out, None, hidden_R, hidden_R, "silu")
        products.weight_grad(hidden_R, x, offsets_E, right_index_R=index_R)
        products.weight_grad(x, hidden_R, offsets_E, left_index_R=index_R)
        products.weight_grad(x_R, hidden_R, offsets_E)
        products.column_sums(hidden_R, offsets_E)
        products.column_sums(x, offsets_E, gates_R, index_R)
        sums.sum_rows(x_R, index_R, None, offsets_E, None, T, K, dtype)
        sums.sum_rows(x_R, index_R, None, offsets_E, gates_R, T, K, torch.float32)
        sums.sum_rows(x_R, index_R, of(T + 1, kind=torch.int64), offsets_E, gates_R, T, 0, torch.float32)
        sums.sum_rows(x_R, index_R, of(T + 1, kind=torch.int64), offsets_E, None, T, 0, dtype)
        sums.sum_rows_grad(of(T, D, kind=torch.float32), x_R, index_R, offsets_E, gates_R, dtype)
        sums.sum_rows_grad(of(T, D, kind=torch.float32), None, index_R, offsets_E, None, dtype)
        if dtype == torch.float32:  # these kernels take no other dtype
            ids, logits_TE = of(R, kind=torch.int64), of(T, E)
            sort.find_places(ids, E + 1)
            sort.find_ranks(ids.view(T, K), of(T, kind=torch.int64), E + 1)
            real_T = of(T, kind=torch.bool)
            kinds = itertools.product((E, 4 * E), (1, 8), (True, False), (True, False))
            for experts, groups, softmax, normalize in kinds:
                if experts > MAX_EXPERTS or experts % groups or K > experts * max(groups // 2, 1) // groups:
                    continue  # 'eager' takes more
                logits_TE, chosen = of(T, experts), (K, softmax, normalize)
                for best_two in (True, False):
                    gate.choose(logits_TE, None, None, *chosen, groups, max(groups // 2, 1), best_two, 1.0)
                gate.choose(logits_TE, of(experts), real_T, *chosen, groups, groups, True, 1.0)
                grads = (of(T, K), of(experts), of(1))
                ids_TK = of(T, K, kind=torch.int64)
                for dscores_TE, valid_T in ((None, None), (logits_TE, None), (logits_TE, real_T)):
                    gate.choose_grad(dscores_TE, *grads, logits_TE, logits_TE, ids_TK, valid_T, softmax, normalize, 1.0)
    return starts


def _quantized(
    of: Callable[..., Tensor], E: int, K: int, N: int, bits: int, group_size: int | None
) -> QuantizedWeight | None:
    """Return matrices on the meta device; None where the groups do not divide them."""
    if group_size is not None and K % group_size:
        return None
    rows, kind = (K, torch.int8) if bits == 8 else (-(-K // 2), torch.uint8)
    groups = 1 if group_size is None else K // group_size
    return QuantizedWeight(of(E, rows, N, kind=kind), of(E, groups, N), K, of(0).dtype)


def compile_launch(launch: Launch, tile: Tile | None, arch: int, dtype: str) -> Compiled:
    """Compile the kernel of this launch for ``sm_<arch>``; ``dtype`` is its name in ``PRODUCTS``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, options = jit_function(launch.kernel), launch.options(tile)
    signature, constants, aligned = specialized(function, launch.args, options)
    choices = {name: value for name, value in options.items() if name not in function.arg_names}
    source, target = ASTSource(function, signature, constants, aligned), GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options=choices)
    registers, spill = _resources(made.asm["cubin"])
    first_wait = FIRST_WAIT.search(made.asm["ttgir"])
    return Compiled(
        kernel=launch.kernel,
        widths="-" if launch.tile is None else "x".join(map(str, launch.tile[1][1:])),
        arch=arch,
        dtype=dtype,
        tile="-" if tile is None else f"{tile.m}x{tile.n} w{tile.warps} s{tile.stages}",
        matrices=_matrices(launch),
        registers=registers,
        spill=spill,
        shared=made.metadata.shared,
        products="tl.dot" in function.src or "product(" in function.src,
        tensor_cores=TENSOR_CORES.search(made.asm["ptx"]) is not None,
        in_flight=None if first_wait is None else int(first_wait[1]),
        widest=_widest_load(made.asm["ptx"]),
    )


def specialized(
    function: Any, args: Sequence[Any], options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Return what the launcher compiles a kernel for: types, constants, and which arguments are multiples of 16."""
    constants = {name: value for name, value in options.items() if name in function.arg_names}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    values = iter(args)
    for i, (name, parameter) in enumerate(zip(function.arg_names, function.params, strict=True)):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value, known = next(values), not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and known:  # as the launcher does
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and known and value != 1 and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, aligned


def _matrices(launch: Launch) -> str:
    return str(launch.constants.get("KIND") or "float")


def _widest_load(ptx: str) -> int:
    vectors = [int(count or 1) * int(bits) // 8 for count, bits in LOAD.findall(ptx)]
    return max((*vectors, *(int(size, 0) for size in ASYNC_LOAD.findall(ptx))), default=0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its stack, which holds the spilled ones."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"\b{word}:(\d+)", usage) for word in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump says neither registers nor stack: {usage.strip()[:200]}")
    return int(registers[1]), int(stack[1])


def compile_all(
    archs: Sequence[int],
    dtypes: Sequence[str],
    kernels: Sequence[str] | None = None,
    widths: Sequence[str] = tuple(WIDTHS),
    matrices: Sequence[str] = MATRICES,
    *,
    all_flags: bool = True,
    all_tiles: bool = True,
) -> Iterator[Compiled]:
    """Compile each kernel with each tile that tuning may choose.

    Args:
        archs: some of ``ARCHS``.
        dtypes: some of ``PRODUCTS``.
        kernels: names, such as "up"; None: all.
        widths: some of ``WIDTHS``; kernels that see no width of rows are compiled for the first alone.
        matrices: some of ``MATRICES``; kernels that read no matrices of experts have the first.
        all_flags: compile every combination of flags in ``launches``, and the first tile for the fewest and the most
            experts that there can be; otherwise compile the first combination of each kernel, or of each way in which
            its matrices are stored.
        all_tiles: compile every tile; otherwise the first for many tokens.
    """
    for dtype in dtypes:
        seen: set[object] = set()
        # Few tokens have tiles of their own, and experts of 4096, 64, 32, 16 and 8 rows meet all there are.
        tokens_of_tiles = (32768, 512, 256, 128, 64) if all_tiles else (32768,)
        sizes = [(pair, tokens, 64, 8) for pair, tokens in itertools.product(widths, tokens_of_tiles)]
        if all_flags:
            sizes += [(widths[0], 512, 1, 1), (widths[0], 512, MAX_EXPERTS, 32)]
        for pair, tokens, num_experts, top_k in sizes:
            with _precision(dtype):
                shape = {"tokens": tokens, "num_experts": num_experts, "top_k": top_k}
                starts = launches(PRODUCTS[dtype], WIDTHS[pair], **shape)
            for launch in starts:
                name = launch.kernel.split(".")[1]
                if (kernels is not None and name not in kernels) or _matrices(launch) not in matrices:
                    continue
                if dtype == "tf32" and "PRECISION" not in launch.constants:
                    continue  # it is the float32 one
                for tile in launch.tiles() if all_tiles and num_experts == 64 else launch.tiles()[:1]:
                    stored = f"{launch.constants.get('KIND')} {launch.constants.get('SIZE')}"
                    flags = repr(sorted(launch.constants.items())) if all_flags else stored
                    width = (launch.tile and (launch.tile[0], pair)) or launch.constants.get("UNIT")
                    what = (launch.kernel, width, tile, flags)
                    if what in seen:
                        continue
                    seen.add(what)
                    for arch in archs:
                        yield compile_launch(launch, tile, arch, dtype)


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """Give float32 products the precision that ``dtype`` names, inside the ``with`` block."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_kernels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=list(ARCHS))
    names = list(PRODUCTS)
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names, help="dtypes of the products")
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS), help="D and F")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="such as up, linear or weight_grad (default: all)")
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES), help="as they are stored")
    parser.add_argument("--first", action="store_true", help="each kernel with one set of flags")
    parser.add_argument("--one_tile", action="store_true", help="each kernel with its first tile")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    failed = 0
    if not args.json:
        heads = f"{'kernel':28}{'matrices':10}{'widths':12}{'dtype':10}{'tile':18}{'card':8}"
        print(f"{heads}{'registers':>10}{'spill':>7}{'shared':>8}{'in flight':>11}{'widest':>8}  tensor cores")
    which = {"all_flags": not args.first, "all_tiles": not args.one_tile}
    for made in compile_all(args.arch, args.dtypes, args.kernels, args.widths, args.matrices, **which):
        wrong = made.wrong()
        failed += wrong is not None
        if args.json:
            print(json.dumps({**asdict(made), "wrong": wrong}), flush=True)
            continue
        cores, waiting = "yes" if made.tensor_cores else "-", "-" if made.in_flight is None else made.in_flight
        print(
            f"{made.kernel:28}{made.matrices:10}{made.widths:12}{made.dtype:10}{made.tile:18}sm_{made.arch:<5}{made.registers:>10}{made.spill:>7}"
            f"{made.shared:>8}{waiting:>11}{made.widest:>8}  {cores}{'' if wrong is None else '  ' + wrong}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
