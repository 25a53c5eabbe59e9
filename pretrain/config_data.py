"""The `data` section of a config: where shards are, how they are mixed and packed, and who reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ringweave.data_pipes.layer_tasks import TASKS, plan_of_task
from ringweave.pretrain.config_base import Count, NonNegative, Positive, Section
from ringweave.pretrain.config_checks import check_plan
from ringweave.pretrain.source_weights import TASK_MARK
from ringweave.pretrain.units import Bytes, Number, Seconds, Switch, Text, Whole

Share = Annotated[Number, Field(ge=0, le=1)]


def _expected(text: str) -> PydanticCustomError:
    """An error that reads `KEY: expected TEXT, got VALUE`."""
    return PydanticCustomError("expected", "{text}", {"text": text})


def parse_tasks(value: Any) -> Any:
    """`all`, a list of tasks or a mapping of tasks to shares, as {task: share}."""
    if value is None:
        return None
    if value == "all":
        return dict.fromkeys(TASKS, 1.0)
    if isinstance(value, Mapping):
        shares = dict(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        names = [name if isinstance(name, str) else repr(name) for name in value]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise _expected(f"each task once; {twice[0]!r} is named twice (its share: `{{{twice[0]}: 2}}`)")
        shares = dict.fromkeys(names, 1.0)
    else:
        raise _expected("`all`, a list of tasks, or a mapping of tasks to shares")
    if not shares:
        raise _expected("at least one task, or `all`")
    for name in shares:
        try:
            plan_of_task(str(name))
        except ValueError as error:
            raise _expected(f"tasks of the table in docs/config.md: {error}") from None
    return shares


_TASKS_SCHEMA = {
    "anyOf": [
        {"const": "all"},
        {"type": "array", "items": {"enum": list(TASKS)}, "minItems": 1, "uniqueItems": True},
        {
            "type": "object",
            "propertyNames": {"enum": list(TASKS)},
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
            "minProperties": 1,
        },
        {"type": "null"},
    ],
    "default": None,
}


def _plan_or_tasks(schema: dict[str, Any]) -> None:
    schema["required"] = [name for name in schema["required"] if name != "plan"]
    schema["oneOf"] = [{"required": ["plan"]}, {"required": ["tasks"]}]


class Source(Section):
    """One stream of records: shards, how a record becomes a document, its share of the tokens.

    tasks: instead of a plan; the data section makes a source of each, and none of those has this key. pipe: a command
    (a list, never a shell line) that writes a shard to its output; "{shard}" in it stands for each name that `shards`
    expands to.
    """

    model_config = ConfigDict(json_schema_extra=_plan_or_tasks)

    name: Text
    shards: Text
    heldout: Text | None = None
    plan: Annotated[tuple[Text, ...], Field(min_length=1)]
    tasks: Annotated[
        dict[str, Positive] | None, BeforeValidator(parse_tasks), WithJsonSchema(_TASKS_SCHEMA)
    ] = Field(default=None, exclude=True)
    weight: NonNegative = 1.0
    pipe: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("tasks") is None:
            return values
        if values.get("plan") is not None:
            raise _expected("`plan` or `tasks`, not both")
        return {**values, "plan": next(iter(TASKS.values()))}  # until `expanded`

    @field_validator("plan")
    @classmethod
    def _plan_items(cls, plan: tuple[str, ...]) -> tuple[str, ...]:
        check_plan(plan)
        return plan

    def expanded(self) -> tuple[Source, ...]:
        """A source for each task, `<source>/<task>`, that divide its weight by their shares; itself without tasks."""
        if self.tasks is None:
            return (self,)
        whole = sum(self.tasks.values())
        return tuple(
            self.model_copy(
                update={
                    "name": f"{self.name}{TASK_MARK}{task}",
                    "plan": plan_of_task(task),
                    "weight": self.weight * share / whole,
                    "tasks": None,
                }
            )
            for task, share in self.tasks.items()
        )


class WorkersSection(Section):
    """Processes of each rank that decode and tokenize, started when there is something to make.

    count 0: in the rank itself, where no limit can hold.
    """

    count: Annotated[Whole, Field(ge=0)] = 2
    memory: Bytes = 4 * 2**30
    timeout: Seconds = 60.0
    ahead: Count = 2


class QuarantineSection(Section):
    """How much of what is read may turn out unusable: a share of all documents, and so many in a row."""

    share: Share = 0.01
    run: Count = 100


class RemoteSection(Section):
    """Reads from object stores and web servers: limits, which hosts a redirect may lead to, and other stores than
    the usual ones. Credentials come from the environment, never from here.

    s3_endpoint, s3_region, gs_endpoint: none: as the environment says; anonymous: public buckets, without credentials.
    """

    timeout: Seconds = 20.0
    retries: Annotated[Whole, Field(ge=0)] = 5
    allow_hosts: tuple[Text, ...] = ()
    allow_private: Switch = False
    s3_endpoint: Text | None = None
    s3_region: Text | None = None
    gs_endpoint: Text | None = None
    anonymous: Switch = False


class CacheSection(Section):
    """Folder for blocks of remote shards and unpacked ones, and the bytes it may take. No folder: no cache.

    Indexes and tokens of such shards lie there too; they are not counted.
    """

    dir: Text | None = None
    size: Bytes = 20 * 2**30


class DataSection(Section):
    """Folder (or URL) of the shards and the sources in it; one that names tasks is given as a source for each.

    lanes: independent streams that take turns; window: packs that are sorted by cost so that the packs of a step
    cost alike; temperature: weights count as weight^(1/temperature); epochs: passes over every source, then the run
    ends (none: sources repeat as long as the stages ask).
    """

    dir: Text
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    lanes: Count | Literal["auto"] = "auto"
    window: Annotated[Whole, Field(ge=0)] | Literal["auto"] = "auto"
    temperature: Positive = 1.0
    epochs: Count | None = None
    workers: WorkersSection = WorkersSection()
    quarantine: QuarantineSection = QuarantineSection()
    remote: RemoteSection = RemoteSection()
    cache: CacheSection = CacheSection()
    allow_pipe: Switch = False

    @field_validator("sources")
    @classmethod
    def _tasks(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        """The sources with a source for each task in the place of those that name tasks."""
        twice = {name for name, count in Counter(source.name for source in sources).items() if count > 1}
        for source in sources:
            if source.tasks is not None and source.name in twice:
                raise _expected(f"names of their own for sources with tasks; {source.name!r} is used twice")
        return tuple(part for source in sources for part in source.expanded())

    @model_validator(mode="after")
    def _pipes(self) -> DataSection:
        for source in self.sources:
            if source.pipe is None:
                continue
            if not self.allow_pipe:
                raise ValueError(
                    f"source {source.name!r} runs a command; expected allow_pipe: true beside it"
                )
            if self.cache.dir is None:
                raise ValueError(
                    f"source {source.name!r} runs a command; expected cache.dir, where its output is kept"
                )
        return self
