"""Compiles the Triton kernels for a GPU that need not be here; prints, as JSON, how often instructions occur."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_onebit.quantize import triton as triton_kernels

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = (
    "fma", "approx", "ftz", "full", "ld.global.v4", "div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64",
    "min.NaN.f32", "max.NaN.f32",
)  # fmt: skip
POINTERS = {"signs": "*u8", "live": "*u8", "scales": "*fp32"}
INTEGERS = {"numel": "i64", "count": "i32", "signs_step": "i32", "scales_step": "i32"}


def compiled(kernel, *, dtype="fp32", block_size=2048, **flags):
    """Instructions of ``kernel`` for aligned values, a multiple of 16 of them."""
    codec = triton_kernels.TritonCodec(block_size=block_size)
    constants, signature, attributes = {**codec._tile, **flags}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        suffix = name.rsplit("_", 1)[-1]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        else:
            signature[name] = parameter.annotation_type or POINTERS.get(suffix, f"*{dtype}")
        if name == "numel" or (signature[name] == f"*{dtype}" and suffix not in POINTERS):
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {name: constants[name] for name in signature if signature[name] == "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs=used, attrs=attributes)
    assembly = triton.compile(source, target=HOPPER, options=codec._options).asm["ptx"]
    return {name: assembly.count(name) for name in INSTRUCTIONS}


def main():
    print(
        json.dumps(
            {
                "encode": compiled(triton_kernels._encode_kernel, L1=False),
                "decode": compiled(triton_kernels._decode_kernel, ADD=True),
                "momentum": compiled(triton_kernels._momentum_kernel, L1=False, SETTLE=False),
                "momentum float64": compiled(triton_kernels._momentum_kernel, dtype="fp64", L1=False, SETTLE=False),
                "mean": compiled(triton_kernels._mean_kernel, L1=False, SETTLE=False),
            }
        )
    )


if __name__ == "__main__":
    main()
