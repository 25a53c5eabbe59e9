"""The `data` section of a config: where shards are, how they are mixed and packed, and who reads them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ringweave.pretrain.config_base import Count, NonNegative, Positive, Section
from ringweave.pretrain.config_checks import check_plan_item
from ringweave.pretrain.units import Bytes, Number, Seconds, Switch, Text, Whole

Share = Annotated[Number, Field(ge=0, le=1)]


class Source(Section):
    """One stream of records: shards, how a record becomes a document, its share of the tokens.

    pipe: a command (a list, never a shell line) that writes a shard to its output; "{shard}" in it stands for
    each name that `shards` expands to.
    """

    name: Text
    shards: Text
    heldout: Text | None = None
    plan: Annotated[tuple[Text, ...], Field(min_length=1)]
    weight: NonNegative = 1.0
    pipe: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None

    @field_validator("plan")
    @classmethod
    def _plan_items(cls, plan: tuple[str, ...]) -> tuple[str, ...]:
        for item in plan:
            check_plan_item(item)
        return plan


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
    """Folder (or URL) of the shards and the sources in it.

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
