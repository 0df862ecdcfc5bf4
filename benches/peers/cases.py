"""What is compared: models, limits and rivals."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """A synthetic model, as `overspill synth` makes it."""

    preset: str
    dtype: str
    format: str = "gguf"

    @property
    def file(self):
        return f"{self.preset}-{self.dtype}" + (".gguf" if self.format == "gguf" else "")


SMALL = "tinyllama-1.1b"
LARGE = "llama-2-7b"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: Model
    rival: str
    # Of the model's bytes, what the process may have in memory; None: all there is.
    share: float | None
    # 'decode' or 'prefill': which figure is compared.
    figure: str = "decode"
    prompt: int = 8
    new: int = 8
    # Least ratio, and least part of the physical ratio, that is asked for; None: only told.
    ask: float | None = None
    ask_physical: float | None = None
    # Whether the disk matters: such a row has a throttled twin.
    disk: bool = field(default=True)


F16, Q8, Q4, Q4K = (Model(SMALL, dtype) for dtype in ("f16", "q8_0", "q4_0", "q4_k"))
BF16 = Model(SMALL, "bf16", "safetensors")

CASES = [
    Case("f16-75", F16, "llama.cpp", 0.75, ask=3.2, ask_physical=0.9, new=12),
    Case("f16-50", F16, "llama.cpp", 0.50, ask=1.7, ask_physical=0.9),
    Case("f16-25", F16, "llama.cpp", 0.25, ask=1.15, ask_physical=0.9),
    Case("q8_0-50", Q8, "llama.cpp", 0.50, ask_physical=0.9, new=12),
    Case("7b-q4_0-50", Model(LARGE, "q4_0"), "llama.cpp", 0.50, ask_physical=0.9, new=4),
    Case("bf16-50-accelerate", BF16, "accelerate", 0.50, ask=4.0, new=5),
    Case("bf16-50-airllm", BF16, "airllm", 0.50, ask=10.0, new=3),
    Case("bf16-50-transformers", BF16, "transformers", 0.50, new=5),
    Case("f16-50-prefill", F16, "llama.cpp", 0.50, figure="prefill", prompt=128, new=1, ask=1.0),
    Case("f16-ram", F16, "llama.cpp", None, ask=1.0, new=48, disk=False),
    Case("q8_0-ram", Q8, "llama.cpp", None, ask=1.0, new=64, disk=False),
    Case("q4_0-ram", Q4, "llama.cpp", None, ask=1.0, new=96, disk=False),
    Case("q4_k-ram", Q4K, "llama.cpp", None, ask=1.0, new=96, disk=False),
    *(Case(f"{model.dtype}-ram-prefill-{prompt}", model, "llama.cpp", None, "prefill", prompt, 1, ask=0.85, disk=False)
      for model in (F16, Q8, Q4, Q4K) for prompt in (128, 512)),
]
