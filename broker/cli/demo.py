"""`demo`: the main job with real processes, and what comes of each way to misuse it."""

import asyncio
import signal
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click
from rich.markup import escape

from broker.cli.output import Output, pass_output

if TYPE_CHECKING:
    from broker.cli.demo_steps import Step

OTHERWISE: Final = 1


@click.command()
@pass_output
def demo(output: Output) -> None:
    """The main job step by step, with real processes, in seconds. No network, no SPIRE, no root.

    Each step says what is expected and what came. Exit code 1 when anything came otherwise.
    """
    from broker.cli.demo_stage import StageError  # noqa: PLC0415 - `--help` need not load gRPC
    from broker.cli.demo_steps import story  # noqa: PLC0415

    steps: list[Step] = []
    started = time.monotonic()

    def told(step: "Step") -> None:
        steps.append(step)
        _say(output, len(steps), step)

    async def run() -> None:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await story(told)

    output.say("[bold]Action Broker[/]: a credential for one act, and what else it is good for (nothing)")
    output.say("starting an embedded trust domain, a broker, a service, an agent and a stranger ...")
    try:
        asyncio.run(run())
    except (StageError, OSError) as error:
        output.fail(f"the demo could not go on: {error}", OTHERWISE)
    except (KeyboardInterrupt, asyncio.CancelledError):
        output.fail("interrupted; everything that was started has been ended", OTHERWISE)
    output.value([{"step": number, **asdict(step), "ok": step.ok} for number, step in enumerate(steps, 1)])
    wrong = [number for number, step in enumerate(steps, 1) if not step.ok]
    output.say("")
    if wrong:
        output.say(f"[red]steps {', '.join(map(str, wrong))} did not come as expected[/]")
        raise SystemExit(OTHERWISE)
    seconds = time.monotonic() - started
    output.say(f"[green]All {len(steps)} steps came as expected[/], in {seconds:.1f} s. Nothing of it is left behind.")
    output.say("next: action-broker dev, to try it by hand")


def _say(output: Output, number: int, step: "Step") -> None:
    colour, mark = ("green", "ok") if step.ok else ("red", "OTHERWISE")
    output.say(f"\n[bold]{number}. {escape(step.title)}[/]")
    output.say(f"   {escape(step.why)}")
    output.say(f"   expected {escape(step.expected)}")
    note = f"; {step.note}" if step.note else ""
    output.say(f"   came     [{colour}]{escape(step.came)}[/]  {mark}, {step.took_ms} ms{note}")
