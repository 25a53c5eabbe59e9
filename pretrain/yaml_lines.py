"""Safe YAML that remembers the line of every key and refuses duplicates.

PyYAML's own loader keeps the last of two equal keys without a word; here both lines are named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ringweave.pretrain.errors import ConfigError, Problem

Path = tuple[str | int, ...]

#: Nesting beyond this is refused before it can exhaust the stack; a config needs about 6.
MAX_DEPTH = 40
#: Values a config may hold after aliases are expanded, so that a few lines cannot fill the memory.
MAX_VALUES = 20_000


@dataclass
class Tree:
    """Plain values (`dict`, `list`, scalars) and the 1-based line of each path."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """Line of `path`, or of its nearest ancestor that stands in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def parse(text: str, *, source: str) -> Tree:
    """Parse one YAML document named `source` in messages.

    Only plain tags are known (no Python objects); anchors are allowed, merge keys (`<<`) are not.
    Raises ConfigError for broken syntax, duplicate keys, keys that are no text, and unknown tags.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        tree = Tree({})
        if node is None:
            return tree
        duplicates: list[Problem] = []
        tree.value = _plain(loader, node, (), tree.lines, duplicates, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = (error.problem or str(error)).splitlines()[0]
        fix = "check indentation, quotes and colons"
        if "'?'" in problem:
            fix = 'put names that end in ? into quotes, as "caption?"'
        raise ConfigError(f"not valid YAML: {problem}", where=where, fix=fix) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", where=source) from error
    finally:
        if loader is not None:
            loader.dispose()
    if duplicates:
        raise ConfigError.from_problems(duplicates, source=source)
    return tree


def _plain(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    path: Path,
    lines: dict[Path, int],
    duplicates: list[Problem],
    source: str,
) -> Any:
    """The plain value of `node`, filling `lines` and `duplicates` on the way."""
    lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > MAX_DEPTH:
        raise yaml.constructor.ConstructorError(
            None, None, f"nested deeper than {MAX_DEPTH}", node.start_mark
        )
    if len(lines) > MAX_VALUES:
        raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_VALUES} values", node.start_mark)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(loader, key_node)
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in out:
                dotted = ".".join(str(p) for p in here)
                duplicates.append(
                    Problem(
                        f"{source}:{line}",
                        dotted,
                        f"key {dotted} is given twice, on lines {lines[here]} and {line}",
                        "delete one of them",
                    )
                )
                continue
            lines[here] = line
            out[key] = _plain(loader, value_node, here, lines, duplicates, source)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(loader, item, (*path, i), lines, duplicates, source) for i, item in enumerate(node.value)
        ]
    return loader.construct_object(node)


def _key(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:merge":
        raise yaml.constructor.ConstructorError(None, None, "keys must be plain names", node.start_mark)
    return str(node.value)
