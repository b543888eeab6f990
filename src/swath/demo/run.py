"""The demo from loading the model to the files it leaves."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text as Line

import swath
from swath.demo import plot, texts
from swath.demo.cases import can_reshape, cases, notes, windowed
from swath.demo.generate import generate
from swath.demo.measure import Case, measure, stored
from swath.demo.model import Loaded, load, unpacked
from swath.demo.report import Conditions, Report, caption, in_words, table
from swath.demo.settings import Settings
from swath.errors import bad_value
from swath.testing.cases import NAMES


class Demo:
    """One run of the demo. After an interrupt ``report`` holds what was measured, and so does its file."""

    def __init__(self, settings: Settings, out: Console) -> None:
        self.settings, self.out = settings, out
        self.report: Report | None = None

    def run(self) -> None:
        """Load, generate, measure and write; the console shows how far it is.

        Raises:
            ValueError, OSError: a model, a text or the output directory cannot be used.
        """
        s = self.settings
        s.output.mkdir(parents=True, exist_ok=True)
        loaded = self._load()
        _check_context(loaded.model.config, s.budget.tokens + s.budget.decode_steps + 1)
        text = texts.topics(loaded.tokenizer) if s.text is None else texts.from_file(loaded.tokenizer, s.text)
        text.take(0, s.budget.tokens)
        if len(text.ids) < s.budget.tokens + s.budget.before:
            self.settings = s = replace(s, budget=replace(s.budget, before=0))
        self.report = Report(_conditions(s, loaded, text.name))
        self._generate(loaded, self.report)
        self._measure(self._cases(loaded), text, self.report)
        self.report.complete = True
        self.report.write(s.json_path)
        plot.save(self.report, s.plot_path)
        self.out.print(f"Wrote {s.json_path} and {s.plot_path}", soft_wrap=True)

    def _load(self) -> Loaded:
        s = self.settings
        first = s.model is None and not unpacked().is_dir()
        note = "Unpacking the model, once (up to a minute)" if first else "Loading the model"
        with self._busy(note):
            loaded = load(s.model, s.device, s.dtype)
        self.out.print(f"{loaded.name}, {NAMES[s.dtype]}, {device_name(s.device)}\n", style="bold", soft_wrap=True)
        return loaded

    def _generate(self, loaded: Loaded, report: Report) -> None:
        s = self.settings
        self.out.print(Line(f"> {s.prompt}", style="dim"), soft_wrap=True)
        case = windowed(loaded.model, s)
        report.generation = generate(case, loaded.tokenizer, s.prompt, s.max_new_tokens, self._show)
        report.write(s.json_path)
        self.out.print(f"\n\n{in_words(report.generation)}\n")

    def _show(self, piece: str) -> None:
        self.out.print(Line(piece), end="", soft_wrap=True)

    def _cases(self, loaded: Loaded) -> list[Case]:
        s = self.settings
        if s.quick or not can_reshape(loaded.model):
            return cases(loaded.model, [], s)
        # Two texts behind the part of the topics that is scored.
        topics, n = texts.topics(loaded.tokenizer), s.budget.tokens
        with self._busy("Calibrating sink logits on two other texts"):
            return cases(loaded.model, [topics.take(first, n) for first in (n, 2 * n)], s)

    def _measure(self, todo: list[Case], text: texts.Text, report: Report) -> None:
        budget = self.settings.budget
        progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            console=self.out,
        )  # fmt: skip
        task = progress.add_task("", total=sum(case.before + budget.tokens + budget.decode_steps for case in todo))
        try:
            with Live(console=self.out, refresh_per_second=8, transient=True) as live:
                for number, case in enumerate(todo, 1):
                    note = f"{number} of {len(todo)}: {case.attention}, {stored(case)}"
                    self._log(note)
                    progress.update(task, description=note)
                    live.update(Group(table(report), progress) if report.rows else progress)
                    ids = torch.cat([text.take(budget.tokens, case.before), text.take(0, budget.tokens)])
                    report.rows.append(measure(case, ids, budget, lambda n: progress.advance(task, n)))
                    report.write(self.settings.json_path)
        finally:
            if report.rows:
                self.out.print(table(report), Line(caption(report.conditions), style="dim"), sep="\n")

    @contextmanager
    def _busy(self, note: str) -> Iterator[None]:
        """A spinner on a terminal, a line in a log."""
        self._log(note)
        with self.out.status(note):
            yield

    def _log(self, note: str) -> None:
        if not self.out.is_terminal:
            self.out.print(note, soft_wrap=True)


def _check_context(config: Any, tokens: int) -> None:
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and longest < tokens:
        raise bad_value("model", f"a context of at least {tokens} tokens", longest)


def _conditions(settings: Settings, loaded: Loaded, text: str) -> Conditions:
    return Conditions(
        model=loaded.name,
        dtype=NAMES[settings.dtype],
        device=device_name(settings.device),
        text=text,
        budget=settings.budget,
        notes=notes(loaded.model, settings),
        versions={"swath": swath.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        date=datetime.date.today().isoformat(),
    )


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the threads that torch computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"
