"""What several services of ours put into messages, and read from them."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from broker._proto.actionbroker.v1 import action_pb2
from broker.action import Action


def timestamp(when: datetime) -> Timestamp:
    """An aware time as protobuf has it."""
    stamp = Timestamp()
    stamp.FromDatetime(when.astimezone(UTC).replace(tzinfo=None))
    return stamp


def to_action(message: action_pb2.Action) -> Action:
    """The action in a message. Raises: Invalid."""
    return Action.parse(message.name, message.resource, message.audience, message.parameters)
