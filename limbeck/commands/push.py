"""Upload a run's student, or the text that it was trained on, to the Hugging Face hub, each with its card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.commands import console, printing
from limbeck.storage.files import link_or_copy, user_path, write_text
from limbeck.types import UserError, canonical_json

TOKEN = "HF_TOKEN"  # noqa: S105 (the variable's name)
LEFT_OUT = (".*", "*.lock", "*.tmp")


def push(
    where: Annotated[
        str, typer.Argument(help="A run folder, or a model's folder in Hugging Face form.", metavar="RUN")
    ],
    to: Annotated[str, typer.Option("--to", help="The repository on the hub: USER/NAME.", metavar="USER/NAME")],
    data: Annotated[
        bool, typer.Option("--data", help="Upload the training text, as a dataset, in place of the student.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it. Default: private.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload the trained student to the Hugging Face hub, or its training text (--data); private unless --public. The
    token is read from HF_TOKEN."""
    if not json_:
        console.out.print("the licence and terms of the teacher apply to what you upload", markup=False)
    with tempfile.TemporaryDirectory() as temporary:
        if data:
            folder = Path(temporary)
            card = write_data(user_path(where), folder)
        else:
            from limbeck.commands.export.student import find_student

            student = find_student(where)
            folder, card = student.folder, card_of(student.folder, student.run)
        printing.print_result(upload(folder, card, to, public=public, kind="dataset" if data else "model"), json_)


def write_data(run: Path, folder: Path) -> str:
    """Write a run's training text into `folder`: train.jsonl, one conversation a line. Returns the card.

    Raises:
        UserError: no run, or one that does not hold its text yet, or whose student wrote it all while it trained.
    """
    from limbeck.config.recipe import load_recipe
    from limbeck.config.rounds import without_rounds
    from limbeck.progress import Silent, StoppedError
    from limbeck.report.card import data_card
    from limbeck.runs.resolve import resolve
    from limbeck.runs.run import Run

    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder (it has no recipe.yaml): --data uploads the training text of a run")
    recipe = load_recipe(run / "recipe.yaml")
    without_rounds(recipe.rounds, recipe.name, "name the folder of one of its rounds")
    try:
        text = Run(resolve(recipe), run, Silent(), lambda: True).text.training()  # stops before it asks anything
    except StoppedError:
        raise UserError(f"{run} does not hold its text yet: `limbeck elicit` writes it") from None
    if not text:
        raise UserError(f"{run} holds no training text: its student wrote it while it trained")
    samples = [sample for sample in text if sample.teaches]
    if not samples:
        raise UserError(f"{run}: none of its {len(text):,} answers can be used (they are empty, refused or filtered)")
    lines = [{"id": sample.id, "messages": list(sample.messages), "writer": sample.writer} for sample in samples]
    write_text(folder / "train.jsonl", "".join(canonical_json(line) + "\n" for line in lines))
    return data_card(recipe, Counter(sample.writer for sample in samples))


def card_of(folder: Path, run: Path | None) -> str:
    """The folder's model card, with the verdict and the table of its run where that was evaluated.

    Raises:
        UserError: there is no model card.
    """
    file = folder / "README.md"
    if not file.is_file():
        raise UserError(
            f"{folder} has no README.md: write a model card into it that says what the model is and whose licence holds"
        )
    card = file.read_text(encoding="utf-8").rstrip() + "\n"
    if run is None or not (run / "evaluation" / "summary.json").is_file():
        return card
    from limbeck.report.data import read_results
    from limbeck.report.page import verdict_of
    from limbeck.report.table import markdown

    summary = read_results(run)
    return f"{card}\n## What was measured\n\n{verdict_of(run, summary)}\n\n{markdown(summary)}"


def upload(folder: Path, card: str, name: str, *, public: bool, kind: str = "model") -> dict[str, Any]:
    """Create the repository (of a "model" or a "dataset") if there is none, and upload the folder with this card in one
    commit.

    Raises:
        UserError: no token, a name that can't be, a public repository without `public`, or the hub refuses.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if get_token() is None:
        raise UserError(f"the hub wants a token that may write: set {TOKEN} (https://huggingface.co/settings/tokens)")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        repository = api.create_repo(name, private=not public, exist_ok=True, repo_type=kind).repo_id
        private = bool(api.repo_info(repository, repo_type=kind).private)
        if not public and not private:
            raise UserError(
                f"{repository} is there already and everybody can see it: add --public, or give another name"
            )
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / kind
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), copy_function=_linked)
            (copy / "README.md").unlink(missing_ok=True)  # which is a link, too
            (copy / "README.md").write_text(card, encoding="utf-8")
            what = "text to distil from, written" if kind == "dataset" else "a student distilled"
            commit = api.upload_folder(
                repo_id=repository, repo_type=kind, folder_path=copy, commit_message=f"Upload {what} with Limbeck"
            )
    except HFValidationError as error:
        raise UserError(f"--to {name}: not a name that a repository can have ({error})") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it") from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused: {error} (does the token in {TOKEN} have write access to {name}?)") from error
    except HTTPError as error:
        raise UserError(f"the hub can't be reached: {error}") from error
    return {"repository": str(commit.repo_url), "private": private, "commit": str(commit.oid)}


def _linked(source: str, target: str) -> str:
    link_or_copy(Path(source), Path(target))
    return target
