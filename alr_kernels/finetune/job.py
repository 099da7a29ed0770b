"""One run on all its processes: what is begun, resumed and finished together, and what its phases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _ranks, _validate_models
from . import card, models
from .data import Source, load
from .metrics import Metrics
from .options import DataOptions, MeasureOptions, ModelOptions, RunOptions, TokenOptions, TrainOptions
from .outcome import Place, read_json, write_json
from .ownership import BEGUN, FACTS, alone, clear_work, has_progress
from .progress import Interrupted, Progress, Stopped
from .stopping import Stop

LEFT_OUT = {
    "dropped": "left out, without a token to learn from",
    "truncated": "cut to the length of a sequence (--max-length)",
    "overlap": "not trained on, because they are measured on",
}
FORMATS = {"text": "plain text", "prompt/completion": "prompts and completions", "messages": "conversations"}
FEW = 10  # held-out rows below which a measurement says little

if TYPE_CHECKING:
    from .data import Texts
    from .models import Loaded
    from .settings import Settings


@dataclass
class Job:
    """A run that goes on.

    Attributes:
        settings, place: what it was asked for, and where its files are.
        metrics, stop, progress: where it logs to, whether it is to stop, who is told.
        resumed: whether it goes on from what an interrupted run left.
        started: when this process began.
        is_main: whether this is the process that writes files.
    """

    settings: Settings
    place: Place
    metrics: Metrics
    stop: Stop
    progress: Progress
    resumed: bool
    started: datetime
    is_main: bool

    @property
    def model_options(self) -> ModelOptions:
        """What ``--model`` and its neighbours say."""
        return self.settings.of(ModelOptions)

    @property
    def train_options(self) -> TrainOptions:
        """How long and how fast."""
        return self.settings.of(TrainOptions)

    def load_model(self, options: ModelOptions | None = None) -> Loaded:
        """Load the model to train; the one that the run starts from, unless other options are given."""
        return models.load(options or self.model_options, trainable=True, seed=self.train_options.seed)

    def max_length(self, loaded: Loaded) -> int:
        """Return how long sequences are, at most."""
        asked = self.settings.of(TokenOptions).max_length
        return asked if loaded.longest is None else min(asked, loaded.longest)

    def texts(self, option: str, loaded: Loaded, *, train: bool) -> Texts:
        """Read and tokenise "data" or "general", and tell what was read and what was left out.

        Args:
            train: False where only held-out rows are wanted.
        """
        tokens = self.settings.of(TokenOptions)
        found = load(
            _source(self.settings, option), loaded.tokenizer, max_length=self.max_length(loaded),
            packing=tokens.packing, loss_on=tokens.loss_on, train=train,
        )  # fmt: skip
        self.settings.same_data(option, found.facts)
        self.remember(f"--{option}", found.facts["fingerprint"])
        name = "general" if self.settings.verb == "record" or option == "general" else "domain"
        for line in _read(name, option, found.facts, train):
            self.progress.say(line)
        asked, longest = tokens.max_length, self.max_length(loaded)
        if option == "data" and longest < asked:
            self.progress.say(f"--max-length: sequences have {longest} tokens, the most that the model takes")
        return found

    def remember(self, what: str, fingerprint: str) -> None:
        """Note what an unfinished run began with, so that it does not go on with something else."""
        path = self.place.work / FACTS
        known = read_json(path) if path.is_file() else {}
        was = known.get(what, fingerprint)
        if was != fingerprint:
            _validate_models.changed_since(str(self.place.out), what, f"{fingerprint[:16]} in place of {was[:16]}")
        _ranks.wait()
        if self.is_main and what not in known:
            write_json(path, {**known, what: fingerprint})

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a phase found; a run that goes on does not repeat a phase that is done."""
        path = self.place.work / f"{name}.json"
        if _ranks.of_first(path.is_file()):
            return read_json(path)
        found = work()
        if self.is_main:
            write_json(path, found)
        _ranks.wait()
        return found


def _read(name: str, option: str, facts: dict[str, Any], train: bool) -> Iterator[str]:
    """Yield what was read, what was left out, and whether little is held out.

    Args:
        name: of the text.
        option: that named it.
        facts: of ``Texts``.
        train: whether it is trained on.
    """
    unit, out = facts["unit"], facts["held_out_rows"]
    parts = [f"{facts['train_rows']:,} to learn ({facts['train_tokens']:,} tokens)"] if train else []
    if out:
        of = f" of {Path(facts['held_out_source']).name}" if facts["held_out_source"] else ""
        parts.append(f"{out:,} held out{of} ({facts['held_out_tokens']:,} tokens)")
    source, kind = Path(facts["source"]).name or facts["source"], FORMATS.get(facts["format"], facts["format"])
    yield f"{name}: {source}, {kind}, {_counted(facts['rows'], unit)}: {', '.join(parts)}"
    for what, text in LEFT_OUT.items():
        if count := facts.get(what):
            yield f"--{option}: {_counted(count, unit)} {text}"
    if out and out < FEW:
        flag = "a larger --held-out" if not facts["held_out_source"] else "more data to measure on"
        yield f"--{option}: {_counted(out, unit)} held out: few, so that what is measured is uncertain; {flag} helps"


def _counted(count: int, unit: str) -> str:
    """Return a number with its unit.

    >>> _counted(1, "row"), _counted(1200, "file")
    ('1 row', '1,200 files')
    """
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"


@contextmanager
def begun(
    settings: Settings, place: Place, resume: bool, overwrite: bool, progress: Progress, save_model: Path | None = None
) -> Iterator[Job]:
    """Begin a run, or go on with one, on all processes; signals are heeded within.

    Raises:
        ValueError, OSError: as :meth:`Place.check`, and for other options than those of the run that goes on.
    """
    from accelerate import PartialState
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving: they would be between our own lines
    logging.set_verbosity_error()  # it warns of tied weights at every checkpoint that is loaded
    device = models.device_of(settings.of(ModelOptions).device)
    PartialState(cpu=device == "cpu")  # joins the job, if a launcher started one
    is_main = _ranks.place()[0] == 0

    with ExitStack() as held:

        def prepare() -> bool:
            model = settings.of(ModelOptions).model
            check = partial(place.check, model, resume=resume, overwrite=overwrite, save_model=save_model)
            check()  # before a folder is made
            held.enter_context(alone(place.work, place.out))
            if check():  # again: another run may just have ended
                card.same_run(place.work / BEGUN, settings)
                return True
            place.clear()
            card.write(place.work / BEGUN, settings)
            return False

        resumed = on_first(prepare)
        stop = held.enter_context(Stop(progress.say))
        metrics = Metrics(place.metrics, is_main)
        job = Job(settings, place, metrics, stop, progress, resumed, datetime.now(timezone.utc), is_main)
        job.remember("the number of processes", str(_ranks.place()[1]))  # they share the batches of a step
        try:
            yield job
        except Exception:
            if is_main and not resumed and not has_progress(place.work):
                clear_work(place.work)  # bad input: nothing to go on with, nothing in the way of another try
                place.tidy_empty()
            raise
        except Stopped:
            raise
        except KeyboardInterrupt as error:
            raise Interrupted(
                "interrupted at once. The same command with --resume goes on from the last checkpoint, or from the "
                "beginning where there is none."
            ) from error


def on_first(work: Callable[[], Any]) -> Any:
    """Let rank 0 work while the others wait; return its result on all of them, or raise its error on all of them."""
    result: Any = None
    error: Exception | None = None
    if _ranks.place()[0] == 0:
        try:
            result = work()
        except Exception as failure:
            error = failure
    told = _ranks.of_first((result, None if error is None else (type(error), str(error))))
    if error is not None:
        raise error
    if told[1] is not None:
        kind, text = told[1]
        raise kind(text)
    return told[0]


def _source(settings: Settings, option: str) -> Source:
    """Return where texts come from; rows are held out alike wherever the same texts stand."""
    data, seed = settings.of(DataOptions), settings.of(TrainOptions).seed
    if option == "data":
        held_out = 0.0 if data.held_out_data is not None else data.held_out
        return Source(
            data.data,
            data.columns,
            data.split,
            data.subset,
            data.max_rows,
            held_out,
            data.held_out_data,
            seed,
            "--data",
        )
    general = settings.of(MeasureOptions)
    assert general.general is not None
    held_out = 0.0 if general.general_held_out_data is not None else data.held_out
    rows = data.max_rows if settings.has(RunOptions) else None
    return Source(
        general.general, general.general_columns, general.general_split, general.general_subset, rows, held_out,
        general.general_held_out_data, seed, "--general",
    )  # fmt: skip
