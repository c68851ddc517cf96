"""A gate that refuses unusual prompts before an answer is generated (Bai et al. 2022, 5.4 and B.9), and its file."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from finetune import answers
from launch import device_mesh, initial_model
from launch.run_settings import SettingError, Template

from rlhf_jax import atomic, lm, parallel
from rlhf_jax.data import padding
from rlhf_jax.diagnostics import ood

FILE = "gate.npz"
"""Name of the file of a gate in the output folder of gate.py."""

Kind = Literal["relative", "exposure"]
Pooling = Literal["mean", "last"]
_KINDS: dict[str, tuple[type, Callable[[Any, Any], np.ndarray]]] = {
    "relative": (ood.Gaussian, ood.relative_mahalanobis),
    "exposure": (ood.Probe, ood.exposure),
}


class Gate(NamedTuple):
    """A detector of hidden states at one layer of a model, and the score above which a prompt is refused."""

    kind: Kind
    """`relative` for the relative Mahalanobis distance, `exposure` for a linear classifier."""
    detector: ood.Gaussian | ood.Probe
    layer: int
    """Number of layers of the model whose output is scored, counted from the first."""
    pooling: Pooling
    """`mean` for the mean of a prompt's hidden states, `last` for that of its last token."""
    limit: float
    identity: dict[str, Any]
    """On what hidden states depend, by flag, as `answers.model_identity` returns it."""

    def score(self, hidden_ND: np.ndarray) -> np.ndarray:
        """Returns the score of each prompt, ``[N]``; higher is less usual."""
        return _KINDS[self.kind][1](self.detector, hidden_ND)

    def refuses(self, hidden_ND: np.ndarray) -> np.ndarray:
        """Returns which prompts are refused, ``[N]``."""
        return self.score(hidden_ND) > self.limit


def save(path: pathlib.Path, gate: Gate) -> None:
    """Writes the file of a gate, atomically."""
    stream = io.BytesIO()
    own = {"kind": gate.kind, "layer": gate.layer, "pooling": gate.pooling, "limit": gate.limit}
    own["identity"] = json.dumps(gate.identity)
    np.savez(stream, **own, **{f"detector_{name}": each for name, each in gate.detector._asdict().items()})
    atomic.replace_file(path, stream.getvalue())


def load(path: str, model: initial_model.InitialModel, *, template: Template, flag: str = "--gate") -> Gate:
    """Reads the gate of a model from its file or from the output folder of gate.py.

    Args:
        path: The file or the folder.
        model: The model whose prompts are scored.
        template: The settings with which its chat template writes the prompts.
        flag: The flag of the gate, for error messages.

    Raises:
        SettingError: There is no such file, it is not a gate, or it was fitted to hidden states of another model, chat
            template or number format.
    """
    file = file_of(path)
    try:
        with np.load(file, allow_pickle=False) as found:
            kind: Any = str(found["kind"])
            detector = _KINDS[kind][0](*(found[f"detector_{name}"] for name in _KINDS[kind][0]._fields))
            pooling: Any = str(found["pooling"])
            identity = json.loads(str(found["identity"]))
            gate = Gate(kind, detector, int(found["layer"]), pooling, float(found["limit"]), identity)
    except OSError as error:
        raise SettingError(f"cannot read {flag} {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SettingError(f"{flag} {path} is not a gate; give the file {FILE} that gate.py writes") from error
    own = answers.model_identity(model, template)
    if gate.identity["the model"] != own["the model"]:
        raise SettingError(f"{flag} {path} was fitted to another model than {model.path}; run gate.py for this model")
    for name, value in own.items():
        if gate.identity[name] != value:
            raise SettingError(
                f"{flag} {path} does not fit: {name} is {value}, but was {gate.identity[name]} in gate.py; use the "
                "same here, or run gate.py again"
            )
    return gate


def file_of(path: str) -> pathlib.Path:
    """Returns the file of a gate, given that or the output folder of gate.py."""
    return pathlib.Path(path) / FILE if pathlib.Path(path).is_dir() else pathlib.Path(path)


def hidden_states(
    model: initial_model.InitialModel,
    prompts_ids: Sequence[Sequence[int]],
    *,
    layer: int,
    pooling: Pooling,
    batch: int,
    mesh: jax.sharding.Mesh | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Returns the hidden state of each prompt after the first layers, ``[N, D]``.

    Args:
        model: The model.
        prompts_ids: Token ids of each prompt.
        layer: Number of layers, counted from the first.
        pooling: Whether it is the mean over the prompt's tokens or that of the last token.
        batch: Number of prompts that are computed together.
        mesh: The mesh; None for one device.
        on_progress: Called with the numbers of finished and of all prompts.
    """
    run = partial(_hidden, cfg=model.cfg, layer=layer, pooling=pooling)
    step = parallel.JitStep(run, donate_argnums=(), mesh=mesh, batch_args=(1, 2), replicated_args=())
    size, done = device_mesh.round_rows_up(batch, mesh), 0
    lengths, hidden_ND = [len(ids) for ids in prompts_ids], None
    for rows, width in answers.batches(lengths, size=size, most=max(lengths)):
        filled = [*rows, *[rows[-1]] * (size - len(rows))]
        inputs = padding.pad_prompts([list(prompts_ids[i]) for i in filled], width=width, pad_id=model.fmt.pad_id)
        found = jax.device_get(step(model.params, *(inputs if mesh is None else parallel.local_rows(inputs, mesh))))
        if hidden_ND is None:
            hidden_ND = np.zeros((len(lengths), found.shape[-1]), np.float32)
        hidden_ND[rows] = found[: len(rows)]
        done += len(rows)
        on_progress(done, len(lengths))
    assert hidden_ND is not None
    return hidden_ND


def _hidden(params: Any, tokens_BP: Any, mask_BP: Any, *, cfg: lm.LMConfig, layer: int, pooling: Pooling) -> jax.Array:
    first, first_cfg = lm.first_layers(params, cfg=cfg, layers=layer)
    hidden_BPD = lm.forward(first, tokens_BP, cfg=first_cfg, mask_BL=mask_BP).hidden_BLD.astype(np.float32)
    return hidden_BPD[:, -1] if pooling == "last" else jnp.mean(hidden_BPD, axis=1, where=mask_BP[:, :, None])


def refusals(fmt: Any, prompts: answers.Prompts, refused_N: np.ndarray, *, n: int, text: str) -> list[dict[str, Any]]:
    """Returns the lines of refused prompts in a file of samples, ``n`` for each, with ``refused`` and no tokens."""
    return [
        answers.line_of(fmt, prompts, answers.Answer(int(row), sample, [], False, 0.0))
        | {"response": text, "stopped": True, "refused": True}
        for row in np.flatnonzero(refused_N)
        for sample in range(n)
    ]
