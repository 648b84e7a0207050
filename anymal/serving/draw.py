"""Drawing: ``<h>prompt</h>`` in an answer → a text-to-image pipeline of diffusers → PNG files.

    answer ──split──▶ reply, prompts ──Painter──▶ FOLDER/0000.png, …

The contract is Mini-Gemini's (Li and others, arXiv 2403.18814): the LLM writes the prompt between tags, as
plain text, and a diffusion model that nobody trained draws it. `anymal chat` is what people run.
"""

import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anymal.errors import UserError
from anymal.model.llm import compute_dtype

_PROMPT = re.compile(r"<h>((?:(?!<h>).)*?)</h>", re.DOTALL)  # the innermost tags: a prompt holds no tag


def split(answer: str) -> tuple[str, list[str]]:
    """An answer → what is left of it as a reply, and the prompts of the pictures to draw, in order.

    Prompts are stripped, and empty ones dropped. A tag without its other half stays in the reply: an answer that was
    cut within a prompt asks for nothing. Of tags within tags the innermost hold the prompt.
    """
    prompts = [prompt.strip() for prompt in _PROMPT.findall(answer)]
    if not _PROMPT.search(answer):
        return answer, []
    reply = re.sub(r"[ \t]{2,}", " ", _PROMPT.sub(" ", answer))
    return reply.strip(), [prompt for prompt in prompts if prompt]


@dataclass(kw_only=True)
class Painter:
    """A text-to-image pipeline of diffusers, loaded when there is something to draw."""

    name: str
    """Hub name or local folder, such as stabilityai/stable-diffusion-xl-base-1.0."""
    device: torch.device
    """Where it runs: on a GPU in bfloat16 (`anymal.model.precision`), else in float32."""
    steps: int = 0
    """Denoising steps; 0 takes the pipeline's default."""
    size: int = 0
    """Height and width in pixels; 0 takes the pipeline's default."""
    seed: int = 0
    """Of the noise that the first prompt of an answer starts from; the second's is one more, and so on."""

    def __post_init__(self):
        if min(self.steps, self.size, self.seed) < 0:
            raise UserError("draw_steps, draw_size and draw_seed cannot be negative")
        if self.size % 8:
            raise UserError(f"draw_size is {self.size}; pipelines draw in multiples of 8 pixels")
        try:
            import diffusers  # noqa: F401  (now, not after the LLM has answered)
        except ImportError as error:
            raise UserError(f"drawing needs diffusers ({error}); install it: pip install -e '.[draw]'") from error

    def draw(self, prompts: list[str], folder: Path) -> list[Path]:
        """Draw each prompt and save it as the next free ``NNNN.png`` of the folder; return the paths.

        The same pipeline, prompts, seed and device give the same pictures.

        Raises:
            UserError: The pipeline does not load, or cannot draw a prompt.
        """
        if not prompts:
            return []
        gc.collect()  # whatever held the GPU before
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        pipeline, paths = self._load(), []
        options = {"num_inference_steps": self.steps, "height": self.size, "width": self.size}
        options = {name: value for name, value in options.items() if value}
        folder.mkdir(parents=True, exist_ok=True)
        for i, prompt in enumerate(prompts):
            noise = torch.Generator("cpu").manual_seed(self.seed + i)  # on the CPU: the same noise whatever draws
            try:
                picture = pipeline(prompt, generator=noise, **options).images[0]
            except (ValueError, torch.OutOfMemoryError) as error:
                raise UserError(f"draw={self.name} cannot draw {prompt!r}: {error}") from error
            path = next(p for n in range(10**9) if not (p := folder / f"{n:04d}.png").exists())
            picture.save(path)
            paths.append(path)
        return paths

    def _load(self) -> Any:
        from diffusers import AutoPipelineForText2Image

        try:  # safetensors only: other weights are pickles
            pipeline: Any = AutoPipelineForText2Image.from_pretrained(
                self.name, dtype=compute_dtype(self.device), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"draw={self.name} does not load as a text-to-image pipeline: {error}") from error
        pipeline.set_progress_bar_config(leave=False)
        return pipeline.to(self.device)
