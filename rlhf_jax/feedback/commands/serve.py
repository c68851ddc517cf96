"""The command ``serve``: the labelling page of a comparison store."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Annotated, Any

from tyro.conf import Positional, arg

from rlhf_jax.feedback import store
from rlhf_jax.feedback.labelers import labeler_report
from rlhf_jax.report import labeler_page

MIN_SECRET = 16
"""Number of characters of an access secret."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves a page on which people label the items of a store.

    People sign in with the tokens that ``assign`` prints. Stop the server with Ctrl-C; nothing is lost if it is killed.
    """

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """The comparison store."""
    set: str | None = None
    """Name of the set that is labelled. It may be left out if the store has one set besides those of chats, and names
    a new set for a chat."""
    host: str = "127.0.0.1"
    """Address at which the server listens. Any other than that of this machine needs --secret-file."""
    port: int = 8080
    """Port at which the server listens; 0 for a free one."""
    names: tuple[str, ...] = ()
    """Names by which others reach the server, such as labels.example.org. By default, --host."""
    secret_file: str | None = None
    """File with a secret of at least 16 characters, which people enter in addition to their token."""
    certificate: str | None = None
    """File with a TLS certificate, for HTTPS."""
    key: str | None = None
    """File with the private key of --certificate."""
    behind_https: bool = False
    """Whether a reverse proxy receives requests over HTTPS and passes them on, so that cookies are only sent over
    HTTPS."""
    instructions: str | None = None
    """Text file with the instructions for labelers. None shows general ones."""
    judgements: int | None = None
    """Number of labelers that are asked about each item, at least 1. None asks all."""
    lease_minutes: float = 30.0
    """Time after which an item that a labeler has opened is offered to others."""
    policy: str | None = None
    """Folder of a model in Hugging Face format, or of the run of a command that saved one. People chat with it; it
    answers each message with two samples."""
    red_team: bool = False
    """Whether people of the chat try to elicit harm, and choose the more harmful answer."""
    temperature: float = 1.0
    """Temperature of the samples of --policy, above 0."""
    top_p: float | None = None
    """Nucleus of the samples of --policy. None samples from all tokens."""
    max_new_tokens: int = 256
    """Number of tokens of a sample of --policy, at most."""
    seed: int = 0
    """Seed of the samples of --policy."""


def run(settings: Serve) -> None:
    """Serves the page until the process is stopped; raises StoreError for settings that cannot be used."""
    try:
        from rlhf_jax.feedback import page
    except ImportError as error:
        raise store.StoreError(
            f"the page needs the package {error.name}; install it with pip install 'rlhf_jax[feedback]'"
        ) from None
    _check(settings)
    secret = None if settings.secret_file is None else _secret(settings.secret_file)
    is_local = settings.host in page.LOOPBACK
    if not is_local and secret is None:
        raise store.StoreError(
            f"--host {settings.host} lets other machines in; give --secret-file FILE with a secret that people enter "
            "in addition to their token, or leave --host out"
        )
    secure = settings.certificate is not None or settings.behind_https
    with store.Store(settings.store) as opened:
        options = page.Options(
            set_name=_set_name(settings, opened),
            instructions=page.INSTRUCTIONS if settings.instructions is None else _text(settings.instructions),
            max_judgements=settings.judgements,
            lease=60.0 * settings.lease_minutes,
            red_team=settings.red_team,
            access_secret=secret,
            hosts=_hosts(settings, page.LOOPBACK),
            secure=secure,
            report=lambda: _report(opened, options.set_name),
            **load_policy(settings),
        )
        try:
            listener = page.listen(settings.host, settings.port)
        except OSError as error:
            reason = f"cannot listen at {settings.host}, port {settings.port} ({error.strerror or error})"
            raise store.StoreError(f"{reason}; choose another --port or --host") from None
        if not is_local and not secure:
            _warn(
                "the connection is not encrypted: others on the network can read tokens and answers; use --certificate"
            )
        if all(each.revoked for each in opened.labelers()):
            _warn(f"nobody can sign in yet; run: python -m rlhf_jax.feedback assign {settings.store} --labelers NAME")
        name = settings.names[0] if settings.names else settings.host
        name = f"[{name}]" if ":" in name else name
        scheme, port = "https" if settings.certificate else "http", listener.getsockname()[1]
        print(f"set {options.set_name!r} of {settings.store}: {scheme}://{name}:{port}/", flush=True)
        page.serve(
            page.make_app(opened, options),
            listener,
            certificate=settings.certificate,
            key=settings.key,
            behind_proxy=settings.behind_https,
        )


def _check(settings: Serve) -> None:
    """Raises StoreError for values out of range, and settings without effect."""
    reason = None
    if not pathlib.Path(settings.store).is_file():
        reason = f"{settings.store} does not exist; make a store with import or assign"
    elif not 0 <= settings.port <= 65535:
        reason = f"--port is {settings.port}; it must be from 0, for a free one, to 65535"
    elif settings.judgements is not None and settings.judgements < 1:
        reason = f"--judgements is {settings.judgements}; it must be at least 1"
    elif settings.lease_minutes <= 0:
        reason = f"--lease-minutes is {settings.lease_minutes:g}; it must be positive"
    elif (settings.certificate is None) != (settings.key is None):
        reason = "--certificate and --key are given together"
    elif settings.policy is None:
        names = ("red_team", "temperature", "top_p", "max_new_tokens", "seed")
        given = [name for name in names if getattr(settings, name) != getattr(Serve, name)]
        reason = f"--{given[0].replace('_', '-')} has no effect without --policy; leave it out" if given else None
    elif settings.temperature <= 0:
        reason = f"--temperature is {settings.temperature:g}; it must be positive, since two samples are compared"
    elif settings.max_new_tokens < 1:
        reason = f"--max-new-tokens is {settings.max_new_tokens}; it must be at least 1"
    elif settings.top_p is not None and not 0 < settings.top_p <= 1:
        reason = f"--top-p is {settings.top_p:g}; it must be above 0 and at most 1"
    if reason is not None:
        raise store.StoreError(reason)


def _report(opened: store.Store, set_name: str) -> str:
    found = labeler_report.report(opened, set_name)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "labelers.html"
        labeler_page.write_page(path, found, title=f"Labelers of {set_name}")
        return path.read_text(encoding="utf-8")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _set_name(settings: Serve, opened: store.Store) -> str:
    names = opened.sets()
    if settings.set is None:
        names = [name for name in names if not name.endswith(" (chat)")]
        if len(names) != 1:
            found = ", ".join(map(repr, names)) or "none; add one with import, or name a new one for a chat"
            raise store.StoreError(f"give --set: the sets of {settings.store} are {found}")
        return names[0]
    store.check_name("set", settings.set)
    if settings.set not in names and settings.policy is None:
        found = ", ".join(map(repr, names)) or "none; add one with import"
        raise store.StoreError(f"{settings.store} has no set {settings.set!r}; its sets are {found}")
    return settings.set


def _hosts(settings: Serve, loopback: tuple[str, ...]) -> tuple[str, ...]:
    wildcard = settings.host in ("0.0.0.0", "::")
    if wildcard and not settings.names:
        raise store.StoreError(
            f"--host {settings.host} needs --names: the names or addresses by which others reach the server"
        )
    return (*settings.names, *(() if wildcard else (settings.host,)), *loopback)


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise store.StoreError(f"{path} is not in UTF-8 ({error}); save it in UTF-8") from None


def _secret(path: str) -> str:
    secret = _text(path).strip()
    if len(secret) < MIN_SECRET:
        raise store.StoreError(
            f"--secret-file {path}: the secret has {len(secret)} characters; use at least {MIN_SECRET}"
        )
    return secret


def _model_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns a folder, or that of the model in it if it is the folder of a run."""
    saved = (path / name for name in ("model", "ppo", "policy", "sft"))
    return next((each for each in saved if (each / "config.json").is_file()), path)


def load_policy(settings: Serve) -> dict[str, Any]:
    """Returns the options of the page that concern the policy."""
    if settings.policy is None:
        return {}
    from rlhf_jax import feedback, generation, lm
    from rlhf_jax.data import chat, dialogues, tokenizers

    folder = _model_folder(pathlib.Path(settings.policy))
    try:
        cfg, params = lm.load(folder)
        fmt = chat.chat_format(tokenizers.load(folder), model_type=cfg.model_type)
    except (ValueError, OSError) as error:
        raise store.StoreError(f"--policy {settings.policy} cannot be used: {error}") from error
    most = cfg.max_length - settings.max_new_tokens
    spec: Any = generation.Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=fmt.stop_ids,
        pad_id=fmt.pad_id,
    )

    def encode(request: str) -> list[int]:
        ids = chat.encode_prompt(fmt, [dialogues.Turn(each["role"], each["content"]) for each in json.loads(request)])
        if len(ids) > most:
            raise ValueError("The conversation is too long for the assistant; start a new one.")
        return ids

    writer = feedback.ModelWriter(
        params,
        cfg=cfg,
        sampling=spec,
        encode=encode,
        decode=lambda ids: str(fmt.tokenizer.decode(list(ids), skip_special_tokens=True)),
        seed=settings.seed,
        batch=1,
    )

    def policy(messages: Any, sample: int) -> str:
        [(_, text)] = writer([json.dumps(messages)], sample=sample)
        return text.text

    described = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    described |= {} if settings.top_p is None else {"top_p": settings.top_p}
    return {"policy": policy, "policy_name": pathlib.Path(settings.policy).resolve().name, "sampling": described}
