"""How much of a GPU's peak do products of GPT-2's shapes reach, and how much of its bandwidth elementwise operations? A
forecast of time assumes `Device.share` and `MOVED.share`: see the notebook speed."""
import torch

from colab_gpt2.model.loading import DTYPES
from colab_gpt2.planning.speed import MOVED, device_of
from colab_gpt2.runtime import check_runtime

ROWS = 8192  # eight blocks of 1,024 tokens


def seconds(work, times=20) -> float:
    "Of one call, by the GPU's own clock."
    for _ in range(3): work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times): work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


def product_rate(width, dtype) -> float:
    "FLOP/s of a layer's four products."
    shapes = [(width, 3*width), (width, width), (width, 4*width), (4*width, width)]
    made = [[torch.randn(size, device="cuda", dtype=dtype) for size in ((ROWS, inputs), (inputs, outputs))]
            for inputs, outputs in shapes]
    def work():
        for inputs, weights in made: torch.mm(inputs, weights)
    return sum(2 * ROWS * inputs * outputs for inputs, outputs in shapes) / seconds(work)


def moving_rate(dtype) -> float:
    "Bytes/s of GELU, which reads and writes 0.4 GB: more than a cache holds."
    numbers = torch.randn(ROWS, 4 * 1600 * 4, device="cuda", dtype=dtype)
    return 2 * numbers.nbytes / seconds(lambda: torch.nn.functional.gelu(numbers, approximate="tanh"))


def main():
    runtime = check_runtime()
    if runtime.device != "cuda": raise SystemExit("There is no CUDA GPU here, so nothing was measured.")
    device, dtype = device_of(runtime), DTYPES[runtime.precision.dtype]
    def share(rate, peak): return f", {rate / peak:.2f} of the data sheet's" if peak else ""
    print(f"{runtime.device_name}, {runtime.precision.dtype}")
    for width in (768, 1024, 1280, 1600):
        rate = product_rate(width, dtype)
        print(f"products {width} wide: {rate / 1e12:.1f} TFLOP/s{share(rate, device and device.peak_half)}")
    rate = moving_rate(dtype)
    print(f"elementwise: {rate / 1e9:.0f} GB/s{share(rate, device and device.bandwidth)}")
    if device: print(f"assumed: {device.share} of the peak in products, {MOVED.share} of the bandwidth")


if __name__ == "__main__": main()
