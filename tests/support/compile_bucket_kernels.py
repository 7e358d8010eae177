"""Compiles kernels as they are launched, for a GPU that need not be here; prints how often instructions occur, as JSON."""

import json

import numpy as np
import torch
import triton
from buckets import ADAM, copy_of_memory, random_layouts, random_memory, random_step, refresh_numbers
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_onebit.quantize import triton as triton_kernels
from lightning_onebit.quantize import triton_gradients, triton_sketch, triton_tables, triton_variance
from lightning_onebit.quantize.tensor_sketch import TensorSketch

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = (
    "fma", "approx", "ftz", "full", "ld.global.v4", "st.global.v4", "global.v2.b64", "div.rn.f32", "div.rn.f64",
    "sqrt.rn.f32", "sqrt.rn.f64", "min.NaN.f32", "max.NaN.f32", "bar.sync", "atom",
    "atom.global.gpu.relaxed.add", "ld.local", "st.local",
)  # fmt: skip
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
NUMELS = [5000, 3]


def instructions(kernel, arguments, constants):
    """Of ``kernel``, compiled for what it was launched with. Tensors are aligned."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif arguments[index] is None:
            signature[name], constexprs[name] = "constexpr", None
        elif isinstance(arguments[index], torch.Tensor):
            signature[name] = POINTERS[arguments[index].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type or "i32"
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    assembly = triton.compile(source, target=HOPPER, options=options).asm["ptx"]
    return {name: assembly.count(name) for name in INSTRUCTIONS}


def launched(dtype=torch.float32, *, space="update", commit=False, masked=False, renews=False, coefficients=ADAM):
    """Of a step of a bucket: each kernel, its arguments, its constants."""
    launches = []

    def record(kernel, programs, memory, *arguments, **constants):
        tile = triton_tables.tile_options(memory.layout.block_size)
        launches.append((kernel, arguments, {**constants, **tile}))

    [layout] = random_layouts(NUMELS, block_size=2048)
    errors = torch.float64 if dtype == torch.float64 else torch.float32
    memory = copy_of_memory(random_memory(layout, masked=masked, renews=renews, dtype=errors))
    step = random_step(NUMELS, dtype=dtype, coefficients=coefficients)
    kernels = triton_kernels.TritonKernels(space=space)
    triton_kernels.launch = triton_gradients.launch = triton_sketch.launch = triton_variance.launch = record
    kernels.encode_(memory, 0, step, commit=commit)
    kernels.serve_(memory, step, commit=commit)
    kernels.apply_(memory, 0, step, commit=not commit)
    triton_gradients.gather_(torch.zeros(layout.flat_numel, dtype=errors), memory, step)
    triton_gradients.scale_(memory, step, torch.ones(()))
    k = 2048
    draws = triton_gradients.draw_sketch(0, total_numel=sum(NUMELS), numel=k, rows_per_draw=256, device=torch.device("cpu"))
    triton_gradients.sketch_(torch.zeros(4, k), memory, step, draws, np.array([0, NUMELS[0]]))
    sketch = TensorSketch(0, [0, 1], NUMELS, dtype=kernels.sketch_dtype, device=torch.device("cpu"))
    kernels.sketch_tensors_(memory, 0, step, sketch)
    if renews:
        messages, correction = memory.variance_messages(), np.ones(len(NUMELS))
        kernels.encode_variance_(memory, messages, correction)
        kernels.serve_variance_(memory, messages)
        kernels.apply_variance_(memory, messages, refresh_numbers(correction))
    return launches


def main():
    found = {}
    everything = ADAM._replace(coupled_decay=0.1, nesterov=0.9)
    for title, names, options in (
        ("", ("encode", "serve", "apply", "gather", "scale", "sketch"), {}),
        (" bfloat16", ("apply", "scale"), {"dtype": torch.bfloat16}),
        (" float64", ("encode",), {"dtype": torch.float64}),
        (" at once", ("encode", "serve"), {"commit": True, "masked": True, "coefficients": everything}),
        (
            " renewed",
            ("apply", "encode_variance", "serve_variance", "apply_variance", "sketch_tensors"),
            {"masked": True, "renews": True},
        ),
        (
            " renewed at once, float64",
            ("encode", "encode_variance", "serve_variance", "apply_variance"),
            {"dtype": torch.float64, "commit": True, "renews": True, "coefficients": everything},
        ),
        (" momentum", ("apply",), {"masked": True, "space": "momentum", "coefficients": everything}),
    ):
        for kernel, arguments, constants in launched(**options):
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            if name in names:
                found[name + title] = instructions(kernel, arguments, constants)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
