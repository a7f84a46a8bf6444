"""How the house is built: what imports what, also within functions."""

import ast
import graphlib
import re

from tests.support import ROOT

STORY = {"driver", "functions", "imagenet", "alexnet"}


def imports(text):
    """The modules that a file imports, and what it takes from them: dotted names."""
    for node in ast.walk(ast.parse(text)):
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (module + alias.name for alias in node.names)


PATHS = [*ROOT.glob("*.py"), *(ROOT / "machinery").rglob("*.py")]
TEXTS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in PATHS}
IMPORTS = {name: list(imports(text)) for name, text in TEXTS.items()}


def importers(folder, *modules):
    """The files of a folder that import one of some modules, or something of it."""
    some = re.compile(rf"({'|'.join(modules)})(\..*)?")
    return [n for n in IMPORTS if n.startswith(folder) and any(map(some.fullmatch, IMPORTS[n]))]


def test_no_folder_imports_what_is_not_its_business():
    assert importers("machinery.", *STORY, "stage_imagenet", "demo", "tests") == []
    assert importers("machinery.cluster.", "boto3", "botocore", "tensorflow", "machinery.storage") == []
    assert importers("machinery.storage.", "ray", "machinery.cluster") == []
    private = [name for name, text in TEXTS.items() if re.search(r"\bray\.(_|core\.generated)", text)]
    assert private == importers("", "ray._private", "ray._raylet") == ["machinery.cluster.joining"]


def test_only_the_story_and_two_programs_are_at_the_top():
    assert {name for name in TEXTS if "." not in name} == STORY | {"stage_imagenet", "demo"}


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: [file for file in TEXTS if name in importers("", file)] for name in TEXTS}
    assert set(graph["driver"]) > STORY - {"driver"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError if one does
