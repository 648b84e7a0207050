"""The program behind `anymal pretrain-imu-encoder`: labelled windows → an IMU encoder, trained in one process."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torch import Tensor, nn
from tqdm import tqdm

from anymal.adapters.imu.modality import Acceleration, IMUDecoder, IMUOptions, Rotation
from anymal.adapters.pretrained import quiet
from anymal.checkpoints.process import process_as_found
from anymal.config.command_line import parse_args
from anymal.config.schema import DataConfig
from anymal.data.loader import RawSample
from anymal.data.quarantine import Quarantine
from anymal.data.stream import walk
from anymal.errors import BadSample, UserError
from anymal.files import is_done, whole_folder
from anymal.model.llm import device
from anymal.sample import Noted

if TYPE_CHECKING:
    from anymal.adapters.architectures.imu_encoder import IMUEncoderModel


@dataclass(kw_only=True)
class IMUTraining:
    """How the IMU encoder is trained."""

    shards: Any = MISSING
    """Training tars: a path, a brace pattern, a folder, or a list of these."""
    out: str = MISSING
    """Folder for the encoder: config.json, model.safetensors, README.md."""
    eval_shards: Any = None
    """Held-out tars, best of other people than the training tars; the accuracy on them is printed."""
    rate: float = 50.0
    """Samples per second (Hz) of the recordings, and of the encoder."""
    acceleration: Acceleration = "m/s2"
    """Unit of the recordings' accelerometer, gravity included."""
    rotation: Rotation = "rad/s"
    """Unit of the recordings' gyroscope."""
    seconds: float = 5.0
    """Length of a window (IMU2CLIP: 5 s). Longer recordings are cropped to their middle."""
    width: int = 128
    """Width of the features."""
    blocks: int = 2
    """Residual blocks after the three strided convolutions."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 32
    """Windows of a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; falls to zero along a cosine."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    seed: int = 0
    """Of weights, batches and augmentation."""
    license: str = "unknown"
    """Licence of the recordings, for the encoder's model card."""

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.rate, self.seconds) <= 0 or self.width % 16:
            raise UserError("steps, batch_size, rate and seconds must be positive, and width a multiple of 16")


def read_windows(source: Any, decode: IMUDecoder, what: str, log: Path) -> tuple[Tensor, list[str]]:
    """Every labelled window of some tars, decoded as the adapter does it.

    Bad samples are skipped and counted as in training, and named in `log`.

    Returns:
        [n, 6, S] float32 windows, and their labels.

    Raises:
        UserError: No shard, no sample, or too many bad ones.
    """
    quarantine = Quarantine(log, max_in_a_row=20, max_share=0.1)
    samples = walk(DataConfig(shards=source, workers=0), use=partial(_labelled, decode), quarantine=quarantine)
    windows, labels, notes = [], [], Counter()
    for window, note, label in tqdm(samples, desc=f"read {what}", unit=" windows", leave=False):
        windows.append(window)
        labels.append(label)
        notes[note] += 1
    if not windows:
        raise UserError(f"{source} holds no windows: wanted are samples of imu.npy and json")
    if quarantine.bad:
        print(f"skipped {quarantine.bad} bad samples of {quarantine.bad + quarantine.good} in {what}, see {log}")
    for note in sorted(filter(None, notes)):
        print(f"{notes[note]} of {len(windows)} {what} {note}")
    return torch.stack(windows), labels


def _labelled(decode: IMUDecoder, raw: RawSample) -> tuple[Tensor, str, str]:
    """The window [6, S], what decoding noted, and the label."""
    label = _label(raw.members)
    decoded = decode(raw.members["imu.npy"])
    return (decoded.tensor, decoded.note, label) if isinstance(decoded, Noted) else (decoded, "", label)


def _label(members: dict[str, bytes]) -> str:
    if not {"imu.npy", "json"} <= members.keys():
        raise BadSample(f"holds {', '.join(sorted(members)) or 'nothing'}; wanted are imu.npy and json")
    try:
        label = json.loads(members["json"])["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample('its json is not an object with a "label"') from error
    if not isinstance(label, str) or not label:
        raise BadSample(f"its label is {label!r}; wanted is a text")
    return label


def augment(windows: Tensor, generator: torch.Generator) -> Tensor:
    """[n, 6, S] standardised windows, each shifted in time (around the end), scaled by up to a tenth, with noise."""
    n, _, samples = windows.shape
    shift = torch.randint(samples, (n, 1), generator=generator)
    positions = (torch.arange(samples) + shift) % samples
    shifted = windows.gather(2, positions[:, None].expand_as(windows))
    scale = 0.9 + 0.2 * torch.rand(n, 6, 1, generator=generator)
    return shifted * scale + 0.05 * torch.randn(windows.shape, generator=generator)


def train(settings: IMUTraining, network: nn.Module, windows: Tensor, targets: Tensor, classes: int) -> nn.Module:
    """Train the encoder, and the linear classifier that is returned, on standardised windows [n, 6, S] and targets [n].

    Cross-entropy with label smoothing on the mean of the features; AdamW, linear warm-up, then a cosine to zero.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    network.to(device()).train()
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(settings.width, classes)).to(device())
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    warmup = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)),
    )
    order, mean_loss = torch.empty(0, dtype=torch.int64), 0.0
    bar = tqdm(range(settings.steps), desc="train IMU encoder", unit="step", dynamic_ncols=True)
    for step in bar:
        if len(order) < settings.batch_size:
            order = torch.cat((order, torch.randperm(len(windows), generator=generator)))
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        features = network(augment(windows[chosen], generator).to(device())).last_hidden_state
        loss = F.cross_entropy(head(features.mean(1)), targets[chosen].to(device()), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 20)
        bar.set_postfix_str(f"loss {mean_loss:.3f}")
    network.cpu().eval()
    return head.cpu().eval()


@torch.no_grad()
def accuracy(network: nn.Module, head: nn.Module, windows: Tensor, targets: Tensor) -> float:
    """Share of windows [n, 6, S] whose likeliest class is the target's."""
    right = 0
    for start in range(0, len(windows), 256):
        some = slice(start, start + 256)
        logits = head(network(windows[some]).last_hidden_state.mean(1))
        right += int((logits.argmax(1) == targets[some]).sum())
    return right / len(windows)


def save(network: "IMUEncoderModel", settings: IMUTraining, count: int, figures: list[str]) -> None:
    """Write the encoder's folder, whole or not at all, with a README that says what it has seen."""
    labels = network.config.labels
    readme = [
        "---",
        f"license: {settings.license}",
        "---",
        f"An IMU encoder: windows of {settings.seconds:g} s at {settings.rate:g} Hz, accelerometer in m/s² and "
        f"gyroscope in rad/s, to features {settings.width} wide.",
        "",
        f"Trained with `anymal pretrain-imu-encoder` on {count} windows **with their labels** "
        f"({', '.join(labels)}), for {settings.steps} steps. Whatever is trained on top of it to name these labels "
        "finds them already told apart.",
        "",
        *figures,
        "",
    ]
    with whole_folder(Path(settings.out)) as folder, quiet():
        network.save_pretrained(folder)
        (folder / "README.md").write_text("\n".join(readme))


def run(settings: IMUTraining) -> float | None:
    """Read, train, measure the accuracy, save. Returns the accuracy on the held-out windows, if there are any."""
    from anymal.adapters.architectures.imu_encoder import IMUEncoderConfig, IMUEncoderModel

    torch.manual_seed(settings.seed)
    decode = _decoder(settings)
    log = Path(settings.out).with_name(f"{Path(settings.out).name}.skipped.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    windows, names = read_windows(settings.shards, decode, "training windows", log)
    labels = sorted(set(names))
    if len(labels) < 2:
        raise UserError(f"all {len(names)} windows are labelled {labels[0]!r}; there is nothing to tell apart")
    mean, std = windows.mean((0, 2)), windows.std((0, 2)).clamp_min(1e-3)
    config = IMUEncoderConfig(
        rate=settings.rate,
        seconds=settings.seconds,
        hidden_size=settings.width,
        blocks=settings.blocks,
        mean=mean.tolist(),
        std=std.tolist(),
        labels=labels,
    )
    network = IMUEncoderModel(config)

    def standardised(windows: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """The windows as the encoder takes them, and their labels' numbers."""
        return (windows - mean[:, None]) / std[:, None], torch.tensor([labels.index(name) for name in names])

    inputs, targets = standardised(windows, names)
    head = train(settings, network, inputs, targets, len(labels))
    figures = [f"Accuracy on its own windows: {accuracy(network, head, inputs, targets):.1%}."]
    held_out = None
    if settings.eval_shards is not None:
        others, other_names = read_windows(settings.eval_shards, decode, "held-out windows", log)
        unknown = sorted(set(other_names) - set(labels))
        if unknown:
            raise UserError(f"the held-out windows have labels that training has not: {', '.join(unknown)}")
        held_out = accuracy(network, head, *standardised(others, other_names))
        most = Counter(other_names).most_common(1)[0][1] / len(others)
        figures.append(f"Accuracy on {len(others)} held-out windows: {held_out:.1%} (most frequent label: {most:.1%}).")
    save(network, settings, len(windows), figures)
    print("\n".join([*figures, f"Written: {settings.out}"]))
    return held_out


def _decoder(settings: IMUTraining) -> IMUDecoder:
    """Decodes as the adapter does, into m/s² and rad/s, but does not standardise: that is yet to be measured."""
    return IMUDecoder(
        rate=settings.rate,
        encoder_rate=settings.rate,
        samples=round(settings.rate * settings.seconds),
        max_seconds=600.0,
        mean=(0.0,) * 6,
        std=(1.0,) * 6,
        scale=IMUOptions(acceleration=settings.acceleration, rotation=settings.rotation).scale,
    )


@process_as_found()
def main(usage: str, argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(IMUTraining, usage, argv)
    if not is_done(Path(settings.out)):
        run(settings)
