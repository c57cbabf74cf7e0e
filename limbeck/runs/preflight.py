"""Checks a recipe against its models' configurations before anything is spent, and estimates its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.config.named_models import TEACHER, NamedLocal, NamedModel
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.config.teacher import BridgedTeacher, SeveralTeachers
from limbeck.elicit.bills import Bills
from limbeck.elicit.step import Estimate
from limbeck.evaluate.thinking_settings import thinking_of
from limbeck.models.compatibility import check_same_template, check_same_vocabulary, check_takes_system
from limbeck.models.forcing import check_forcing
from limbeck.models.load import check_rows, check_source, frame_tokenizer, is_ready, load_config, load_tokenizer
from limbeck.models.placement import Devices
from limbeck.models.prune import SPREADS, check_kept
from limbeck.models.quantise import refuse
from limbeck.models.quantised import check_numbers, quantisation
from limbeck.models.ray_pool import check_ray
from limbeck.models.scores import check_scorer, is_scorer
from limbeck.models.sources import source_of
from limbeck.models.start import scratch_config
from limbeck.models.template import prompt_ids, text_ids
from limbeck.models.weights import context_length, empty_model
from limbeck.runs.advice import judge_cautions
from limbeck.runs.cost import Plan, make_plan
from limbeck.runs.evaluation_requests import asked_to_measure
from limbeck.runs.fit import fitted
from limbeck.runs.hardware import Hardware, listed, measured, stated
from limbeck.runs.lengths import Lengths, TokenCounter, counted_by, lengths_of, question_lengths, shown_length
from limbeck.runs.memory import compute_dtype
from limbeck.runs.resolve import Method, resolve
from limbeck.runs.shapes import Shape, Shapes
from limbeck.runs.sharing import check as check_sharing
from limbeck.types import RecipeError, UserError


def check(recipe: str | Path | Recipe, device_like: str | None = None) -> Plan:
    """Refuse a recipe that can't work, and estimate the cost of one that can; no weights are loaded.

    Args:
        recipe: a recipe, a file, or the name of a built-in one.
        device_like: hardware of `runs.hardware` to estimate for, such as h100-80gb; by default the recipe's device.

    Raises:
        RecipeError: an impossible combination, with its place in the recipe.
        UserError: a device that is not here, hardware that is named twice, or prompts that fit no context and no
            template.
    """
    return check_method(resolve(recipe if isinstance(recipe, Recipe) else load_recipe(recipe)), device_like)


def check_method(method: Method, device_like: str | None = None, folder: Path | None = None) -> Plan:
    """`check` for a recipe that is resolved already; answers that the run's folder holds tell how long answers are."""
    hardware = _hardware(method.recipe, device_like)
    store = None if folder is None else folder / "store.sqlite"
    estimate = plan(method, hardware, store)
    if is_ready(method.recipe.speaker):  # a model that isn't here yet is looked at by the run
        fitting = fitted(method)
        estimate = estimate if fitting is method else plan(fitting, hardware, store)
        method = fitting
    return replace(estimate, notes=method.prompt_notes)


def _hardware(recipe: Recipe, device_like: str | None) -> Hardware | None:
    """The hardware to estimate for, if it is named and need not be here."""
    cluster = recipe.machine.cluster
    if cluster is None:
        return None if device_like is None else listed(device_like)
    if device_like is not None:
        raise UserError("--device-like and machine.cluster each name hardware to estimate for: leave one of them out")
    if cluster.devices > 1:
        check_sharing(recipe)
    return stated(cluster)


def plan(method: Method, hardware: Hardware | None = None, store: Path | None = None) -> Plan:
    """Estimate the cost of a method from its models' configurations.

    Args:
        hardware: where it will run; by default the recipe's device, which must be here then.
        store: of the run's folder.

    Raises:
        RecipeError: models that don't fit together, or that a loss can't compare.
    """
    recipe = method.recipe
    if hardware is None:
        devices = Devices(recipe.machine)
        hardware = measured(devices.student.device, compute_dtype(recipe))
        devices.teacher  # noqa: B018 (refused where it is missing)
        if recipe.machine.workers is not None:
            check_ray()
    _check_templates(recipe)
    _check_sources(recipe)
    config = load_config(recipe.speaker)
    teacher = None if recipe.teacher.model is None else Shape.of(config)
    student, max_length = _student_shape(method, config)
    _check_precision(recipe, config)
    for path, tokens in (
        ("writer.max_tokens", max(w.max_tokens for w in recipe.writer)),
        ("evaluate.max_tokens", recipe.evaluate.max_tokens),
    ):
        if tokens >= max_length:
            raise RecipeError(path, f"{tokens} leaves no room for a prompt in a context of {max_length}")
    _check_budgets(method, max_length)
    _check_shown(method)
    others: tuple[Shape, ...] = ()
    if isinstance(recipe.teacher, SeveralTeachers):
        others = tuple(_other_teacher(recipe, other.model, n) for n, other in enumerate(recipe.teacher.beside))
    for term in method.terms:
        if teacher is not None:
            term.check_models(student, teacher)
    named = {name: _named_shape(model, f"models.{name}") for name, model in (recipe.models or {}).items()}
    judging = recipe.evaluate.judge
    judge = named[judging] if judging in named else None if judging is None else _judge_shape(judging)
    prompts = (method.training_prompts, method.held_out_prompts)
    judges = () if method.rewards is None else method.rewards.judges
    judging_names = dict.fromkeys(name for _, step in judges for name in step.asks())
    reading = tuple(shape for name in judging_names if (shape := named.get(name)) is not None)
    shapes = Shapes(student, teacher, others, judge, scorers=(*_scorer_shapes(method), *reading))
    lengths = _lengths(method, store)
    bills = _bills(method, again=False)
    made = make_plan(recipe, method.terms, prompts, shapes, hardware=hardware, lengths=lengths, bills=bills)
    own = asked_to_measure(method, round(lengths.held_out))
    made = replace(made, requests=made.requests + own.requests, teacher_tokens=made.teacher_tokens + own.tokens)
    said = [*judge_cautions(recipe, method.steps, judges)]
    said += [f"what the stage {name} takes before each round is not counted" for name in method.stages]
    if method.at_once:
        said.append(f"of these rounds, {method.at_once} stand for the control that does all at once (rounds.at_once)")
    made = _with_text(method, made, lengths, bills)
    return replace(made, rounds=method.rounds + method.at_once, cautions=(*made.cautions, *said))


def _lengths(method: Method, store: Path | None) -> Lengths:
    """How long the method's prompts, questions and answers are."""
    prompts, tokens = method.training_prompts, _tokens(method.recipe)
    given = method.held_out_prompts if method.holds_out_answers else ()
    return replace(
        lengths_of(method.recipe, method.steps, prompts, tokens=tokens, store=store, given=given),
        shown=shown_length(prompts, method.measured_context, tokens),
        questions=question_lengths(method.steps, prompts, show=method.prompt_context, tokens=tokens),
    )


def _with_text(method: Method, made: Plan, lengths: Lengths, bills: Sequence[Estimate]) -> Plan:
    """The plan with how many texts there are, what asking again adds at most, and what the teacher's text costs.

    Args:
        bills: of the steps of elicitation if nothing is asked for again.
    """
    most, limit = _bills(method, again=True), method.recipe.prompts.limit
    pairs = list(zip(bills, most, strict=True))
    shares = [step.asks().count(TEACHER) / max(1, len(step.asks())) for _, step in method.steps]
    plain = made.requests - sum(bill.requests for bill in bills), made.teacher_tokens - sum(b.tokens for b in bills)

    def tokens(asked: Sequence[Estimate]) -> tuple[int, int]:
        """(read, written) by the teacher, with its share of what the steps ask."""
        own = list(zip(shares, asked, lengths.questions, strict=True))
        read = plain[0] * lengths.shown + sum(share * bill.requests * question for share, bill, question in own)
        return int(read), int(plain[1] + sum(share * bill.tokens for share, bill, _ in own))

    paid, (read, written) = Bills(method.recipe, Path(), str), tokens(bills)
    about, at_most = paid.price(read, written, TEACHER), paid.price(*tokens(most), TEACHER)
    return replace(
        made,
        texts=(len(method.training_prompts), len(method.held_out_prompts)),
        limited=limit is not None and len(method.training_prompts) >= limit,
        again=(sum(b.requests - a.requests for a, b in pairs), sum(b.tokens - a.tokens for a, b in pairs)),
        text_cost=None
        if about is None or at_most is None
        else {"about": about, "at_most": at_most, "tokens_read": read, "tokens_written": written},
    )


def _tokens(recipe: Recipe) -> TokenCounter:
    """How tokens are counted: by the speaker's tokenizer, where it is here."""
    if not is_ready(recipe.speaker):
        return TokenCounter.by_letters()
    tokenizer = load_tokenizer(recipe.speaker, recipe.speaker_template)
    return counted_by(
        lambda messages: len(prompt_ids(tokenizer, messages)), lambda text: len(text_ids(tokenizer, text))
    )


def _check_budgets(method: Method, max_length: int) -> None:
    """Refuse budgets of thinking that no context has room for, and models that can't be held to one."""
    recipe = method.recipe
    for task in method.tasks:
        thinking = thinking_of(task)
        if thinking is None:
            continue
        tokens = thinking.levels[-1] + (task.protocol.max_tokens or recipe.evaluate.max_tokens)
        if tokens >= max_length:
            raise RecipeError(
                "evaluate.metrics",
                f"the task {task.name} lets a model think and answer in {tokens} tokens, which leaves no room for a"
                f" prompt in a context of {max_length}: lower its budget or max_tokens",
            )
        for source in (recipe.speaker, recipe.student.start.pretrained):
            if source is not None and is_ready(source):
                check_forcing(source_of(source).tokenizer(source).get_vocab())


def _check_templates(recipe: Recipe) -> None:
    """Refuse models without a tokenizer and a usable chat template; those that are not fetched yet are looked at when
    they are."""
    teacher = ("teacher.model", recipe.teacher.model, getattr(recipe.teacher, "template", None))
    student = ("student.start.pretrained", recipe.student.start.pretrained, recipe.student.template)
    for path, source, template in (teacher, student):
        if source is None or not is_ready(source):
            continue
        try:
            tokenizer = source_of(source).tokenizer(source)
            path = f"{path.partition('.')[0]}.template"
            frame_tokenizer(tokenizer, source, template)
        except UserError as error:
            raise RecipeError(path, str(error)) from error


def _check_sources(recipe: Recipe) -> None:
    """Refuse models whose files can't be what the recipe makes of them, as far as can be told without weights."""
    start = recipe.student.start
    named = {
        "teacher.model": (recipe.teacher.model, getattr(recipe.teacher, "template", None)),
        "student.start.pretrained": (start.pretrained, recipe.student.template),
    }
    for path, (source, template) in named.items():
        if source is None:
            continue
        try:
            check_source(source)
            made_from = path != "teacher.model" or start.pretrained is None
            config = load_config(source)
            if made_from:
                check_numbers(config, source)
            if is_ready(source):
                check_rows(empty_model(config), load_tokenizer(source, template), source)
        except RecipeError:
            raise
        except UserError as error:
            raise RecipeError(path, str(error)) from error
        if quantisation(config) is not None and path == "teacher.model" and getattr(recipe.teacher, "quantise", None):
            raise RecipeError("teacher.quantise", f"{source} is quantised already; leave it out")


def _check_precision(recipe: Recipe, config: Any) -> None:
    """Refuse weights that can't be kept as the recipe says; `config` is the speaker's."""
    if recipe.teacher.model is not None:
        refuse(getattr(recipe.teacher, "quantise", None), config, "teacher.quantise")
    lora = recipe.student.lora
    if lora is not None:
        start = recipe.student.start
        ours = config if start.pretrained is None else load_config(start.pretrained)
        refuse(lora.base, scratch_config(start.scratch, config) if start.scratch else ours, "student.lora.base")


def _check_shown(method: Method) -> None:
    """Refuse a system message for a model whose template has no place for one."""
    recipe = method.recipe
    context = method.prompt_context
    if context is None or context.system is None:
        return
    if recipe.teacher.model is not None:
        check_takes_system(load_tokenizer(recipe.speaker, recipe.speaker_template))
    start = recipe.student.start.pretrained
    if start is not None and (method.is_prompted or (recipe.teacher.model is None and method.teacher_reads_rows)):
        check_takes_system(load_tokenizer(start, recipe.student.template), "student")


def _student_shape(method: Method, config: Any) -> tuple[Shape, int]:
    """(the student's sizes, how many tokens both models can read); `config` is the speaker's."""
    recipe = method.recipe
    start = recipe.student.start
    like = Shape.of(config)
    max_length = context_length(config)
    if start.prune is not None:
        layer_numbers = start.prune.keep if isinstance(start.prune.keep, list) else None
        layers = start.prune.layers if layer_numbers is None else len(layer_numbers)
        assert layers is not None
        if layers > like.layers or (layer_numbers and layer_numbers[-1] >= like.layers):
            raise RecipeError("student.start.prune", f"the teacher has only {like.layers} layers, numbered from 0")
        _check_kept(config, start.prune.keep, layers, like.layers)
        return like.with_layers(layers), max_length
    if start.scratch is not None:
        made = scratch_config(start.scratch, config)
        try:
            return Shape.of(made), min(max_length, context_length(made))
        except UserError as error:
            raise RecipeError("student.start.scratch.config", str(error)) from error
    if start.pretrained is None or recipe.teacher.model is None:
        return like, max_length
    other = load_config(start.pretrained)
    if method.teacher_reads_rows and not isinstance(recipe.teacher, BridgedTeacher):
        tokenizers = (
            load_tokenizer(recipe.speaker, recipe.speaker_template),
            load_tokenizer(start.pretrained, recipe.student.template),
        )
        check_same_vocabulary(*tokenizers)
        check_same_template(*tokenizers)
    return Shape.of(other), min(max_length, context_length(other))


def _check_kept(config: Any, keep: str | list[int], count: int, total: int) -> None:
    """Refuse layers that no configuration can describe without the others. Where they are chosen by the text, those
    that other ways would choose stand for them: if none of them can be described, that is refused, too."""
    if isinstance(keep, list):
        choices = [tuple(keep)]
    else:
        choices = [SPREADS[way](count, total) for way in ([keep] if keep in SPREADS else SPREADS)]
    refused: list[UserError] = []
    for kept in choices:
        try:
            check_kept(config, kept)
        except UserError as error:
            refused.append(error)
    if len(refused) == len(choices):
        raise RecipeError("student.start.prune", str(refused[0])) from refused[0]


def _other_teacher(recipe: Recipe, source: str, number: int) -> Shape:
    """The sizes of a further teacher; refused if its tokens or template differ from the first's."""
    try:
        check_source(source)
        first = load_tokenizer(recipe.speaker, recipe.speaker_template)
        other = load_tokenizer(source, recipe.speaker_template)
        check_same_vocabulary(first, other)
        check_same_template(first, other)
        return Shape.of(load_config(source))
    except UserError as error:
        raise RecipeError(f"teacher.beside[{number}].model", str(error)) from error


def _scorer_shapes(method: Method) -> tuple[Shape, ...]:
    """The sizes of the reward models. One that gives no score of a text is refused here."""
    shapes = []
    for name in method.rewards.models if method.rewards is not None else ():
        try:
            stage = method.stages.get(name)
            start = None if stage is None else str(stage.student.start.pretrained)
            shapes.append(Shape.of(check_scorer(name) if start is None else load_config(start)))
        except UserError as error:
            raise RecipeError("rollout.rewards", str(error)) from error
    return tuple(shapes)


def _bills(method: Method, *, again: bool) -> list[Estimate]:
    """What each step of elicitation will ask for, given the samples that the step before it leaves; with `again`, where
    every answer is asked for again as often as the step's `retries` allow."""
    bills: list[Estimate] = []
    prompts = len(method.training_prompts)
    for _, step in method.steps:
        once = step if again else step.model_copy(update={"retries": 0} if hasattr(step, "retries") else {})
        bills.append(once.estimate_of(bills[-1].samples if bills else prompts, prompts))
        prompts = bills[-1].samples if step.kind in ("expand", "curate") else min(prompts, bills[-1].samples)
    return bills


def _judge_shape(source: str, path: str = "evaluate.judge", template: str | None = None) -> Shape:
    """The judge's sizes. A judge that can't be loaded is refused here, not hours later by the evaluation."""
    try:
        if is_scorer(source):
            return Shape.of(check_scorer(source))
        check_source(source)
        shape = Shape.of(load_config(source))
        if is_ready(source):
            load_tokenizer(source, template)
        return shape
    except UserError as error:
        raise RecipeError(path, str(error)) from error


def _named_shape(model: NamedModel, path: str) -> Shape | None:
    """The sizes of a model that the recipe names; None of one behind a server."""
    if not isinstance(model, NamedLocal):
        return None
    shape = _judge_shape(model.model, path, model.template)
    config = load_config(model.model)
    if model.quantise is not None and quantisation(config) is not None:
        raise RecipeError(f"{path}.quantise", f"{model.model} is quantised already; leave it out")
    refuse(model.quantise, config, f"{path}.quantise")
    return shape
