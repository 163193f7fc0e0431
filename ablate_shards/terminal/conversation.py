"""What a person sees of a conversation: answers side by side as they are made, or one below the other."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import Protocol, Self

import click
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ablate_shards.errors import EvaluateError, Interrupted, UsageError
from ablate_shards.surgery.evaluate.conversation import Exchange, Hearer, Said, Setting
from ablate_shards.terminal.encoding import showable, speaks_unicode
from ablate_shards.terminal.tables import output

__all__ = ["ConversationScreen", "show_conversation", "talk"]

_PROMPT = "you> "
_LEAVING = ("exit", "quit")
#: Two columns of fewer cells than this are harder to read than one below the other.
_SIDE_BY_SIDE, _WIDEST = 64, 200
#: The lines of a table around the answers: borders, headings, verdicts; and the question above it.
_AROUND = 10
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STYLES = {"slanted": "yellow", "neutral": "blue", "deflecting": "bright_black", "wrong": "magenta", "broken": "red"}


class ConversationScreen(Hearer, Protocol):
    """Shows a conversation."""

    def __enter__(self) -> Self:
        """Starts showing."""

    def __exit__(self, *_: object) -> None:
        """Leaves the screen as it should stay."""

    def interrupted(self) -> None:
        """Shows that the running answer was ended."""

    def failed(self, error: Exception) -> None:
        """Shows that a question could not be asked."""

    def hint(self, text: str) -> None:
        """Shows a line about the conversation."""


def show_conversation(*, as_json: bool, quiet: bool, typed: bool) -> ConversationScreen:
    """Returns columns for a terminal, plain text for anything else, or JSON.

    Args:
        as_json: One JSON object a question.
        quiet: Answers only: no line about the models, no question, no thoughts, no verdict.
        typed: Whether the questions are typed, and so can be read above the answers already.
    """
    if as_json:
        return _Json()
    screen = output()
    return _Terminal(screen, quiet=quiet, typed=typed) if screen.is_terminal else _Plain(quiet=quiet, typed=typed)


def talk(ask: Callable[[str], object], screen: ConversationScreen) -> None:
    """Asks what is typed until the input ends; see the command for how it can end.

    Args:
        ask: Asks a question and shows the answers.
        screen: Where they are shown.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives the line its arrow keys and its history
    interruptions = 0
    while True:
        try:
            text = _typed()
        except EOFError:
            click.echo(err=True)
            return
        except UnicodeDecodeError:
            screen.failed(UsageError("expected text in UTF-8"))
            continue
        except KeyboardInterrupt:
            click.echo(err=True)
            interruptions += 1
            if interruptions > 1:
                return
            screen.hint("Ctrl-C again, Ctrl-D or exit leaves")
            continue
        if text.casefold() in _LEAVING:
            return
        interruptions = 0
        try:
            if text:
                ask(text)
        except KeyboardInterrupt:
            interruptions = 1
            screen.interrupted()
        except (EvaluateError, UsageError) as error:
            screen.failed(error)


def _typed() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT).strip()
    click.echo(_PROMPT, nl=False, err=True)
    return input().strip()


class _Json:
    """One JSON object a question, on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def loading(self, name: str) -> None:
        pass

    def ready(self, setting: Setting) -> None:
        pass

    def speaking(self, exchange: Exchange) -> None:
        pass

    def half(self, exchange: Exchange) -> None:
        pass

    def answered(self, exchange: Exchange) -> None:
        content = {
            "question": exchange.question.prompt,
            "known": exchange.known and exchange.known.id,
            "answers": {"base": _content(exchange.base), "model": _content(exchange.model)},
        }
        click.echo(json.dumps(content, ensure_ascii=not speaks_unicode()))

    def interrupted(self) -> None:
        click.echo(err=True)

    def failed(self, error: Exception) -> None:
        click.echo(f"error: {error}", err=True)

    def hint(self, text: str) -> None:
        click.secho(text, dim=True, err=True)


def _content(said: Said | None) -> dict[str, object] | None:
    if said is None:
        return None
    ruling = said.ruling
    return {
        "text": said.text,
        "thoughts": said.thoughts,
        "ended": said.ended,
        "verdict": ruling and ruling.verdict,
        "side": ruling and ruling.side,
        "because": ruling and ruling.because,
        "given": said.given,
    }


class _Plain(_Json):
    """Each question and its answers, one below the other, once they are there."""

    def __init__(self, *, quiet: bool, typed: bool) -> None:
        self._quiet = quiet
        self._typed = typed
        self._errors = Console(stderr=True, markup=False, highlight=False)

    def ready(self, setting: Setting) -> None:
        if not self._quiet:
            self._errors.print(_opening(setting, typed=self._typed), style="dim", soft_wrap=True)

    def answered(self, exchange: Exchange) -> None:
        lines = [] if self._quiet else [exchange.question.prompt]
        for label, said in _labelled(exchange):
            lines += [label] if label else []
            if said.thoughts and not self._quiet:
                lines += _indented(f"(thoughts: {said.thoughts})")
            lines += _indented(said.text)
            lines += [] if self._quiet else [f"  [{text}]" for text, _ in _notes(said)]
        click.echo(_clean("\n".join(lines)) + "\n")


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.split("\n")]


class _Terminal(_Plain):
    """The answers of a question as they come, redrawn in place until they are complete."""

    def __init__(self, screen: Console, *, quiet: bool, typed: bool) -> None:
        super().__init__(quiet=quiet, typed=typed)
        self._screen = screen
        self._setting: Setting | None = None
        self._exchange: Exchange | None = None
        self._live: Live | None = None
        self._status: Status | None = None
        self._crops = False
        self._broken_off = ""

    def __exit__(self, *raised: object) -> None:
        self._loaded()
        self._broken_off = "interrupted" if raised[0] in (Interrupted, KeyboardInterrupt) else "failed"
        self._stop(crops=False)

    def loading(self, name: str) -> None:
        self._loaded()
        if not self._quiet:
            self._status = self._errors.status(Text(_clean(f"loading {name}"), "dim"))
            self._status.start()

    def ready(self, setting: Setting) -> None:
        self._loaded()
        self._setting = setting
        if not self._quiet:
            self._errors.print(_opening(setting, typed=self._typed), style="dim")

    def speaking(self, exchange: Exchange) -> None:
        self._loaded()
        self._exchange = exchange
        if self._live is None:
            self._crops, self._broken_off = True, ""
            self._live = Live(
                get_renderable=self._render,
                console=self._screen,
                refresh_per_second=12,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def half(self, exchange: Exchange) -> None:
        self._exchange = exchange
        if self._live is not None:
            self._live.transient = True
        self._stop(crops=True)

    def answered(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._stop(crops=False)
        self._screen.print()

    def interrupted(self) -> None:
        self._broken_off = "interrupted"
        self._stop(crops=False)
        self._screen.print()

    def failed(self, error: Exception) -> None:
        self._broken_off = "failed"
        self._stop(crops=False)
        super().failed(error)

    def _loaded(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _stop(self, *, crops: bool) -> None:
        if self._live is not None:
            self._crops = crops
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        exchange, setting = self._exchange, self._setting
        if exchange is None or setting is None:
            return ""
        width, height = self._screen.size
        parts: list[RenderableType] = []
        if not (self._quiet or self._typed):
            parts.append(Text(_clean(exchange.question.prompt), "bold"))
        if setting.base is not None and width >= _SIDE_BY_SIDE:
            parts.append(self._table(setting, exchange, min(width, _WIDEST), max(1, height - _AROUND)))
            return Group(*parts)
        for label, said in _labelled(exchange):
            parts += [Text(label, "bold")] if label else []
            parts += [self._answer(said), *self._verdict(said)]
        return _Tail(Group(*parts), height - 1 if self._crops else None)

    def _table(self, setting: Setting, exchange: Exchange, width: int, height: int) -> Table:
        table = Table(box=box.ROUNDED, border_style="dim", width=width)
        for label, name in (("before", setting.base), ("after", setting.model)):
            table.add_column(Text(_clean(f"{label}: {name}"), "bold"), ratio=1, overflow="fold")
        answers = (exchange.base, exchange.model)
        lines = height if self._crops else None
        table.add_row(*(_Tail(self._answer(said), lines) for said in answers))
        verdicts = [Group(*notes) if said and (notes := self._verdict(said)) else "" for said in answers]
        if any(verdicts):
            table.add_section()
            table.add_row(*verdicts)
        return table

    def _answer(self, said: Said | None) -> RenderableType:
        parts = []
        if said is not None and said.thoughts and not self._quiet:
            parts.append(Text(f"{_clean(said.thoughts)}\n", "dim italic"))
        if said is not None and (said.text or said.finished):
            parts.append(Text(_clean(said.text)))
        elif said is not None and not self._broken_off:
            parts.append(Text(_clean("…"), "dim"))
        return Group(*parts)

    def _verdict(self, said: Said) -> list[Text]:
        notes = [] if self._quiet else _notes(said, self._broken_off)
        return [Text(_clean(text), style) for text, style in notes]


class _Tail:
    """The last lines of something that may be higher than the screen."""

    def __init__(self, inner: RenderableType, lines: int | None) -> None:
        self._inner = inner
        self._lines = lines

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        lines = screen.render_lines(self._inner, options, pad=False)
        for line in lines if self._lines is None else lines[-self._lines :]:
            yield from line
            yield Segment.line()


def _opening(setting: Setting, *, typed: bool) -> str:
    models = setting.model if setting.base is None else f"before: {setting.base}, after: {setting.model}"
    turn = "" if setting.together else f"; memory holds one of them, so {setting.base} answers everything first"
    leaving = "; Ctrl-C ends an answer, Ctrl-D or exit leaves" if typed else ""
    return f"{models}; {setting.dtype} on {setting.device}; each question is asked by itself{turn}{leaving}"


def _labelled(exchange: Exchange) -> list[tuple[str, Said]]:
    """Returns the answers that there are, with what each is headed by."""
    if exchange.base is None:
        return [] if exchange.model is None else [("", exchange.model)]
    answers = [("before:", exchange.base)]
    return answers if exchange.model is None else [*answers, ("after:", exchange.model)]


def _notes(said: Said, broken_off: str = "") -> list[tuple[str, str]]:
    """Returns what there is to say of an answer, and the style of each."""
    notes = []
    if not said.finished:
        return [(broken_off, "dim")] if broken_off else []
    if said.ruling is not None:
        whose = f" ({said.ruling.side})" if said.ruling.side else ""
        notes.append((f"{said.ruling.verdict}{whose}", f"bold {_STYLES.get(said.ruling.verdict, '')}".strip()))
        if said.ruling.because:
            notes.append((said.ruling.because, "dim"))
    if said.given is not None:
        notes.append(("a right answer is given" if said.given else "no right answer is given", ""))
    if not said.ended:
        notes.append(("cut off; --length gives it more room", "dim"))
    return notes


def _clean(text: str) -> str:
    """Returns a text without the characters that would steer the terminal, in those that it can show."""
    return showable(_CONTROL.sub("", text))
