"""Public names lead to their entry: under each path to import them from, and wherever a page has one in code."""

from collections import defaultdict
from functools import cache
from importlib import import_module
from typing import Any

from docutils import nodes
from reference import path_of, public_names
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

MEMBERS = ("method", "property", "attribute", "classmethod", "staticmethod")


def add_aliases(app: Sphinx, env: BuildEnvironment) -> None:
    """Put a name that has its entry under another path in the inventory too."""
    objects = env.domaindata["py"]["objects"]
    for module in env.domaindata["py"]["modules"]:
        for name in public_names(import_module(module)):
            entry = objects[path_of(module, name)]
            alias = ObjectEntry(entry.docname, entry.node_id, entry.objtype, aliased=True)
            objects.setdefault(f"{module}.{name}", alias)


@cache
def entries_by_ending(env: BuildEnvironment) -> dict[str, list[ObjectEntry]]:
    """The entries of names by all that their paths end with; for members of a class, at least both names."""
    found = defaultdict(list)
    for path, entry in env.domaindata["py"]["objects"].items():
        words = path.split(".")
        last = len(words) - (entry.objtype in MEMBERS)
        for first in range(last):
            known = found[".".join(words[first:])]
            if all(one.node_id != entry.node_id for one in known):
                known.append(entry)
    return found


class LinkNames(SphinxPostTransform):
    """Make links of ``Spectrum``, ``Spectrum.load``, ``curvature.layer_spectra`` and ``layer_spectra(...)``."""

    default_priority = 200

    def run(self, **options: Any) -> None:
        """Called by Sphinx."""
        for literal in list(self.document.findall(nodes.literal)):
            node = literal.parent
            while node and not isinstance(node, (nodes.reference, nodes.title, addnodes.desc_signature)):
                node = node.parent
            entry = None if node else self.entry_of(literal.astext())
            if entry:
                here, there = self.env.docname, (entry.docname, entry.node_id)
                literal.replace_self(make_refnode(self.app.builder, here, *there, literal.deepcopy()))

    def entry_of(self, code: str) -> ObjectEntry | None:
        """The entry of the name that some code is, or calls; None where several could be meant."""
        name, call, _ = code.partition("(")
        if not (call or "." in name or name[:1].isupper()):
            return None  # `trainability` and `effective_rank` are words and keys too
        found = entries_by_ending(self.env).get(name, [])
        nearby = [entry for entry in found if entry.docname == self.env.docname] or found
        return nearby[0] if len(nearby) == 1 else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("env-updated", add_aliases)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
