"""A server's log: one JSON object a line, without prompts, tokens or the text of exceptions.

An exception's text may quote a prompt or a token.
"""

import json
import logging
import re
import time
import traceback

EXTRA = "fields"


class JsonLines(logging.Formatter):
    """Records as JSON: time (UTC), level, logger, message, the record's `fields`.

    Of an error the line has its class and its places in the code.
    """

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line of JSON."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": message(record),
        }
        line |= getattr(record, EXTRA, {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            line["places"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-5:]]
        return json.dumps(line)


def message(record: logging.LogRecord) -> str:
    """The message of a record, of another library's record its first line.

    asyncio puts exceptions, with their text, into the other lines.
    Of asyncio's first line, what stands before the description of a callback, which shows its
    arguments.
    """
    text = record.getMessage()
    if record.name.partition(".")[0] != "fastgrpo":
        text = text.partition("\n")[0]
    return re.split(r"[(<]", text, maxsplit=1)[0].rstrip() if record.name == "asyncio" else text


def start() -> None:
    """Log to stderr in this form, for the whole process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for talkative in ("httpx", "httpcore"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """`extra` of a log call: the fields of the line beside its message."""
    return {EXTRA: values}
