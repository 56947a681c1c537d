"""Where logs go."""

import logging
import sys

import structlog

_OF_GUARDS = ("reason", "detail", "correlation_id")  # what guards log of a refusal beside its line; not what others do


def configure_log(level: str, *, as_json: bool) -> None:
    """Logs go to stderr: JSON lines for a service, text for a terminal. No log call is ever given a credential."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            repr_native_str=True,  # escapes what would move the cursor or turn the text around
            exception_formatter=structlog.dev.plain_traceback,  # the pretty ones print local variables: credentials
        )
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    # What rooms that others import, and libraries, say through the standard library comes out in the same form.
    foreign = logging.StreamHandler(sys.stderr)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(_OF_GUARDS), *shared],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[foreign], force=True)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
