"""Trained models, and rounds of pairs, on the Hugging Face hub, with cards that say how they were made."""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hermesflow.config import Config, load_config, to_toml
from hermesflow.data.published_pairs import export_pairs
from hermesflow.evaluation.metrics import is_balanced, summarize
from hermesflow.models.family import trained_rounds
from hermesflow.runs.run import load_trained
from hermesflow.runtime import files
from hermesflow.runtime.files import InputError, StrPath

_PUSHED = "pushed.json"
"""In a round's folder: the dataset's id that its pairs were pushed to."""
_SELF_PLAY = "self-play ([HermesFlow, arXiv 2502.12148](https://arxiv.org/abs/2502.12148))"
_SETTINGS = "## Settings\n\n<details><summary>config.toml</summary>\n\n{}\n\n</details>\n"
_FIXES = {401: "use a valid token (hf auth login, or HF_TOKEN)", 403: "use a token that may write to this owner's"}


def push(
    source: StrPath,
    repo: str,
    *,
    pairs: bool = False,
    number: int | None = None,
    private: bool = False,
    family: str = "auto",
) -> str:
    """Sends a model, or the pairs of a run's round, to the Hugging Face hub, by the token that huggingface_hub finds.

    Args:
        source: a run's folder, whose last trained round is taken, or what load_model opens; of pairs a run's folder.
        repo: "OWNER/NAME"; made if need be. Files of the same names are replaced, others stay.
        pairs: sends pairs as tables of the datasets library (preference_tables.py); else a model as Model.save does.
        number: the round of the pairs, from 1; None is the first.
        private: nobody but the owner may see it.
        family: see load_model; of a run its own.
    Returns: the repository's address.
    Raises: InputError if there is no such thing to send, no token, or the hub refuses it or cannot be reached.
    """
    if number is not None and not pairs:
        raise InputError("--round: belongs to --pairs; of a run the model of the last trained round is sent")
    _check_access(repo)
    of_round = Path(source) / f"round-{number or 1}"
    config = load_config(path) if (path := Path(source) / "config.toml").is_file() else None
    if not pairs:
        model = load_trained(source, family)
    elif config is None or not (path := of_round / "pairs.parquet").is_file() or not _count(path):
        raise InputError(f"{of_round}: has no pairs; give the folder of a run and a --round that was curated")
    with tempfile.TemporaryDirectory(prefix="hermesflow-") as place:
        folder = Path(place) / "repository"
        if pairs:
            files.check_output(of_round / _PUSHED)
            card = _pairs_card(of_round, config, export_pairs(source, number or 1, folder, "datasets"))
        else:
            with files.atomic_folder(folder) as temporary:
                model.save(temporary)
            card = _model_card(Path(source), repo, config, family)
        files.write_text(folder / "README.md", card)
        address = _send(folder, repo, "dataset" if pairs else "model", private)
    if pairs:
        files.write_json(of_round / _PUSHED, repo)
    return address


def _check_access(repo: str) -> None:
    """Raises InputError if this can be no repository, or there is no token; asks nobody."""
    from huggingface_hub import get_token  # loaded only where it is needed: it takes a while
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        is_whole = "/" in repo
    except HFValidationError:
        is_whole = False
    if not is_whole:
        raise InputError(f"{files.shown(repo)}: is no id of the hub; give OWNER/NAME of letters, digits, -, _ and .")
    token = get_token() or ""
    if not (token and token.isascii() and token.isprintable()):  # an HTTP client's error would show it
        raise InputError("no token for the hub, or none that can be one; log in with hf auth login, or set HF_TOKEN")


def _send(folder: Path, repo: str, kind: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=True)
    try:
        address = api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise InputError(f"{repo}: is there already, for all to see; make it private on the hub, or choose another")
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)
    except InputError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP client and the file system
        response = getattr(error, "response", None)
        if response is None:
            reason = f"cannot be sent ({files.reason_of(error)}); check the network connection, and try again"
        else:
            says = getattr(error, "server_message", None) or response.reason_phrase
            fix = _FIXES.get(response.status_code, "correct that, or try again later")
            reason = f"the hub refuses it ({response.status_code}, {says}); {fix}"
        raise InputError(f"{repo}: {reason}") from error
    return str(address)


def _model_card(source: Path, repo: str, config: Config | None, family: str) -> str:
    from huggingface_hub import ModelCardData

    name, family = (config.model.name, config.model.family) if config else (str(source), family)
    option = f" --model {repo}" + ("" if family == "auto" else f" --family {family}")
    use = f'hermesflow generate "a large red circle"{option}\nhermesflow caption picture.png{option}'
    parts, pushed = [f"# {repo}\n\nA unified multimodal model: it draws images and reads them.", _block(use)], set()
    if config:
        last = int(trained_rounds(source)[-1].parent.name.removeprefix("round-"))
        parts.append(f"## Training\n\nBy {_SELF_PLAY} from {_text(name)}, on records of {_text(config.data.source)}:")
        for number in range(1, last + 1):
            folder, of_round = source / f"round-{number}", config.of_round(number)
            kept = f", {_count(path)} pairs" if (path := folder / "pairs.parquet").is_file() else ""
            made = f"{_text(of_round.selfplay.algorithm)}, {of_round.data.num_records} records{kept}"
            parts.append(f"- round {number}: {made}")
            pushed |= {str(files.read_json(path))} if (path := folder / _PUSHED).is_file() else set()
        parts += [*_results(source, last), _SETTINGS.format(_block(to_toml(config)))]
    is_on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) and not Path(name).parent.is_dir()
    tags = ["hermesflow", "self-play", "any-to-any"]
    data = ModelCardData(base_model=name if is_on_hub else None, library_name="hermesflow", pipeline_tag=tags[-1],
                         tags=tags, datasets=sorted(pushed) or None)  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts)


def _results(run_folder: Path, number: int) -> Iterator[str]:
    """What the run measured before self-play and after a round, if it did both."""
    paths = [run_folder / f"round-{each}" / "evaluation.json" for each in (0, number)]
    if all(path.is_file() for path in paths):
        try:
            before, [after] = summarize([files.read_json(path) for path in paths])
            rows = list(_rows(before, after, after["change"]))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise error if isinstance(error, InputError) else files.damaged(paths[1], "evaluation", error) from error
        yield "## Results\n\nOn held-out records, with 95 % intervals; a change is that of the same records."
        if "by_category" in after and not is_balanced(after):
            yield "Understanding is by the records' own questions, which ask only of what is there."
        yield "\n".join([f"| | before | after round {number} | change |\n| --- | --- | --- | --- |", *rows])


def _rows(before: dict[str, Any], after: dict[str, Any], change: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in after.items():
        if f"{name}_ci95" in after:
            cells = [_cell(metrics[name], metrics[f"{name}_ci95"], "") for metrics in (before, after)]
            cells.append(_cell(change[name]["change"], change[name]["ci95"], "+") if name in change else "-")
            yield f"| {_text((above + name).replace('_', ' '))} | {' | '.join(cells)} |"
        elif isinstance(value, dict) and name not in ("by_category", "by_element_type", "change"):
            yield from _rows(before.get(name, {}), value, change.get(name, {}), f"{above}{name}, ")


def _cell(value: float | None, interval: list[float] | None, sign: str) -> str:
    return "-" if not interval else "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(value, *interval, s=sign)


def _pairs_card(folder: Path, config: Config, tables: Path) -> str:
    """The card of the tables, and what the run knows of them."""
    number = int(folder.name.removeprefix("round-"))
    curation, by = config.of_round(number).curation, _text(config.model.name)
    by += f" after round {number - 1}" if number > 1 else ""
    how = (
        f"{by} drew {curation.num_images} images for each prompt of {_text(config.data.source)} and wrote "
        f"{curation.num_captions} captions of each image; the best became `chosen`, the worst `rejected`. Images were "
        f"judged by {_text(config.model.judge or 'the model itself')}."
        + (" A chosen image is the record's own." if curation.win_image == "real" else "")
        if (folder / "candidates").is_dir()
        else "the pairs were imported."
    )
    drawn, told = (_count(tables / f"{name}.parquet", "id") for name in ("generation", "understanding"))
    return f"""{files.read_text(tables / "README.md")}
- `generation`, {drawn} rows: `chosen` and `rejected` are images of `prompt`
- `understanding`, {told} rows: `chosen` and `rejected` are answers to `prompt`, a question about `images`
- both: `id` and `category` of the record, `chosen_score`, `rejected_score`

Round {number} of {_SELF_PLAY}: {how}

{_SETTINGS.format(_block(to_toml(config)))}"""


def _count(path: Path, column: str = "record_id") -> int:
    return files.read_parquet(path, [column]).num_rows


def _block(text: str) -> str:
    """Code in Markdown, which no line of the text can end."""
    return textwrap.indent(text.strip(), "    ")


def _text(text: str) -> str:
    """Plain words in Markdown, whatever the text holds."""
    return re.sub(r"([!-+.:-@[-`{-~])", r"\\\1", " ".join(text.split()))  # ASCII punctuation but , - /
