"""The study's own rules: what dvc.yaml, params.yaml and the notebooks promise each other.

Stages are read through DVC, so matrix entries and ${…} stand here as they will run.
"""

import ast
import importlib.util
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from jetlab import notebooks, run
from jetlab.layers import MIXERS
from jetlab.paths import ROOT

SOURCE = ROOT / "src"
# Modules that a stage need not depend on: none can change a number, and each change would re-run the whole study.
PLUMBING = {
    "jetlab.paths": "finds files",
    "jetlab.seeding": "a change of seeds is a change of every number; its stability has a test of its own",
    "jetlab.track": "writes what it is given",
    "jetlab.progress": "draws on the terminal",
    "jetlab.plots": "pictures are looked at, not read by a later stage",
    "jetlab.config": "reads and checks params.yaml, whose sections are tracked",
    "jetlab.run": "runs the notebook",
    "jetlab.notebooks": "gives notebooks their form",
}
# Looked into, but no dependency by itself.
LISTS = {"jetlab.layers": "names the mixers, each of which is a dependency: one more must not re-run the others"}
CLOCK_USERS = {
    "jetlab.train.loop": "decides when to save a resume file; no result holds the time",
    "jetlab.train.ranks": "says how long processes wait for one another",
    "jetlab.data.corpus": "pauses before it opens a file again that could not be reached",
    "jetlab.evaluate.execution": "ends programs that do not end",
}
CLOCKS = {"time", "timeit", "datetime"}
LISTINGS = {"glob", "rglob", "iglob", "iterdir", "listdir", "scandir", "walk"}


def load_stages() -> dict:
    if not (ROOT / "dvc.yaml").exists():
        return {}
    from dvc.repo import Repo

    return {stage.addressing: stage for stage in Repo(ROOT).index.stages}


STAGES = load_stages()
DVC_YAML = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml") if STAGES else {}
PARAMS = run.read_params(ROOT / "params.yaml") if STAGES else {}
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))


def relative(item) -> Path:
    """The path of a dependency or output from the root."""
    return Path(item.fs_path).relative_to(ROOT)


def files(stage) -> list[Path]:
    """Dependencies that are files or folders; parameters are apart."""
    return [relative(dep) for dep in stage.deps if dep not in stage.params]


def command(stage):
    words = shlex.split(stage.cmd)
    assert words[:3] == ["python", "-m", "jetlab.run"], f"a stage runs one notebook by jetlab.run, got {stage.cmd}"
    return run.parse_command(words[3:])


def values(stage) -> dict:
    return dict(map(run.parse_value, command(stage).set))


@cache
def notebook_of(stage):
    return notebooks.read(ROOT / command(stage).notebook)


def code(nb) -> str:
    lines = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code").splitlines()
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def defaults(stage) -> dict:
    """The names that the `parameters` cell assigns, with their plain values."""
    source = notebooks.parameter_cells(notebook_of(stage))[0].source
    names = run.assigned_names(source)
    literals = [ast.literal_eval(node.value) for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return dict(zip(names, literals, strict=True))


# ---- what a stage says ----------------------------------------------------------------------------------------------


def test_there_is_a_study():
    assert STAGES, "dvc.yaml declares no stage"
    assert list((ROOT / "notebooks").glob("*.ipynb"))


@each_stage
def test_params_are_exactly_the_sections_that_the_command_passes(stage):
    declared = [section for dependency in stage.params for section in dependency.params]
    assert sorted(declared) == sorted(command(stage).params)
    assert all(relative(dependency) == Path("params.yaml") for dependency in stage.params)


@each_stage
def test_the_notebook_assigns_exactly_what_it_is_given(stage):
    given = {*command(stage).params, *values(stage), "out_dir"}
    assert set(defaults(stage)) == given
    assert defaults(stage)["out_dir"].startswith("scratch/")


@each_stage
def test_the_smoke_defaults_have_the_keys_of_params_yaml(stage):
    for section in command(stage).params:
        mine, given = defaults(stage)[section], PARAMS[section]
        assert mine is given is None or sorted(mine) == sorted(given), section  # null: a profile without the section


@each_stage
def test_dependencies_exist_or_are_made_by_another_stage(stage):
    made = {relative(out) for other in STAGES.values() for out in other.outs}
    for dependency in files(stage):
        above = {dependency, *dependency.parents}
        written = above & made or any(out.is_relative_to(dependency) for out in made)
        assert (ROOT / dependency).exists() or written, f"{dependency} neither exists nor is an output"
        links = [p for p in (ROOT / dependency, *(ROOT / dependency).rglob("*")) if p.is_symlink()]
        assert not links, "DVC does not follow links inside a folder: an edit behind one would go unseen"


@each_stage
def test_the_notebook_is_a_dependency_and_its_executed_form_a_cached_output(stage):
    assert Path(command(stage).notebook) in files(stage)
    executed = Path(command(stage).out) / "notebook.ipynb"
    assert [out.use_cache for out in stage.outs if relative(out) == executed] == [True]


@each_stage
def test_outputs_lie_in_the_results_folder_of_the_command(stage):
    for out in stage.outs:
        inside = relative(out).is_relative_to(command(stage).out) or relative(out).parts[0] == "reports"
        assert inside, f"{relative(out)} is not below {command(stage).out}"


@each_stage
def test_what_git_keeps_is_a_metric_or_plot_so_that_the_run_cache_works(stage):
    for out in stage.outs:
        assert not out.persist, f"{relative(out)}: persist keeps stale files"
        # DVC's run cache restores a stage only if its plain outputs are cached; the report takes seconds to write anew
        kept = out.use_cache or out.metric or out.plot or stage.addressing == "report"
        assert kept, f"{relative(out)}: declare it under metrics or plots"


@each_stage
def test_a_stage_has_a_description_and_one_line_of_command(stage):
    entry = DVC_YAML["stages"][stage.addressing.partition("@")[0]]
    assert entry.get("desc")
    assert "\n" not in stage.cmd.strip(), "DVC runs each line in a shell of its own: write cmd with >-"
    assert not stage.frozen


def test_all_runs_of_one_notebook_write_to_folders_of_their_own():
    outs = [command(stage).out for stage in STAGES.values()]
    assert len(set(outs)) == len(outs)


def test_every_plot_names_a_declared_file_and_its_axis():
    made = {relative(out).as_posix() for stage in STAGES.values() for out in stage.outs}
    for plot in DVC_YAML.get("plots", []):
        for name, options in plot.items() if isinstance(plot, dict) else [(plot, {})]:
            y = (options or {}).get("y")
            for file in y if isinstance(y, dict) else [name]:
                assert file in made or (ROOT / file).is_file(), f"plot {name!r}: no stage declares {file}"
            assert isinstance(y, dict) and options.get("y_label"), f"plot {name!r} needs y: file: column and a y_label"


def test_every_metric_named_at_the_top_exists():
    for metric in DVC_YAML.get("metrics", []):
        assert (ROOT / metric).exists(), metric


# ---- parameters -----------------------------------------------------------------------------------------------------


def parameter_files() -> list[Path]:
    return [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))] if STAGES else []


@pytest.mark.parametrize("file", parameter_files(), ids=lambda file: file.name)
def test_both_yaml_dialects_read_the_same_numbers(file):
    # papermill and many editors speak YAML 1.1, DVC and jetlab 1.2; write 1.0e-4, true, 10
    assert yaml.safe_load(file.read_text()) == run.read_params(file)


@pytest.mark.parametrize("file", parameter_files()[1:], ids=lambda file: file.name)
def test_a_profile_has_the_sections_and_keys_of_params_yaml(file):
    profile = run.read_params(file)
    assert list(profile) == list(PARAMS)
    for section, content in PARAMS.items():
        assert section == "text" or sorted(profile[section]) == sorted(content), section


# ---- what a stage's code reads --------------------------------------------------------------------------------------


def module_file(module: str) -> Path | None:
    path = SOURCE.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def imported(source: str, module: str = "", is_package: bool = False) -> set[str]:
    """The jetlab modules that `source` imports anywhere, in functions too; what only type checkers see is left out."""
    found = set()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {child for statement in node.body for child in ast.walk(statement)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    with_parents = {".".join(name.split(".")[: i + 1]) for name in found for i in range(name.count(".") + 1)}
    return {name for name in with_parents if name.partition(".")[0] == "jetlab" and module_file(name)}


def closure(modules: set[str]) -> set[str]:
    """`modules` and all that they import, not looking into the plumbing."""
    seen, todo = set(), set(modules)
    while todo:
        module = todo.pop()
        if module in seen or module in PLUMBING:
            continue
        seen.add(module)
        file = module_file(module)
        todo |= imported(file.read_text(), module, file.name == "__init__.py")
    return seen


def kinds(content) -> set[str]:
    """The token mixers that parameters name; MIXERS imports their modules by name, out of an import's sight."""
    if isinstance(content, dict):
        return kinds(list(content.values()))
    if isinstance(content, list):
        return set().union(*map(kinds, content))
    return {content} & set(MIXERS) if isinstance(content, str) else set()


def code_of(stage) -> set[str]:
    passed = {section: PARAMS[section] for section in command(stage).params} | values(stage)
    return closure(imported(code(notebook_of(stage))) | {f"jetlab.layers.{kind}" for kind in kinds(passed)})


def only_documented(file: Path) -> bool:
    return all(isinstance(node, ast.Expr) for node in ast.parse(file.read_text()).body)  # a docstring changes no number


@each_stage
def test_dependencies_cover_every_module_that_the_stage_imports(stage):
    declared = files(stage)
    for module in sorted(code_of(stage)):
        file = module_file(module).relative_to(ROOT)
        if module not in LISTS and not only_documented(ROOT / file):
            assert any(file.is_relative_to(dep) for dep in declared), f"{stage.addressing} imports {file} unnoticed"


@each_stage
def test_dependencies_are_no_wider_than_the_code_that_the_stage_uses(stage):
    used = code_of(stage)
    unused = {Path("src/jetlab/layers") / f"{kind}.py" for kind in MIXERS if f"jetlab.layers.{kind}" not in used}
    for dependency in files(stage):
        assert dependency not in {Path("src"), Path("src/jetlab"), Path("kernels"), Path(".")}, "the world is too wide"
        covered = {file for file in unused if file != dependency and file.is_relative_to(dependency)}
        assert not covered, f"{dependency} re-runs {stage.addressing} for {sorted(map(str, covered))}: name the files"


@pytest.mark.parametrize("module", [*PLUMBING, *LISTS, *CLOCK_USERS])
def test_each_exception_from_the_rule_exists(module):
    assert module_file(module)


@each_stage
def test_no_stage_but_throughput_and_report_reads_the_clock(stage):
    if stage.addressing in ("throughput", "report"):
        return
    sources = {"the notebook": code(notebook_of(stage))}
    sources |= {module: module_file(module).read_text() for module in code_of(stage) - set(CLOCK_USERS)}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not CLOCKS & set(modules), f"{stage.addressing}: {name} imports {modules}; timings go to throughput"


# ---- results --------------------------------------------------------------------------------------------------------


def calls(source: str) -> set[str]:
    functions = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


@each_stage
def test_results_are_read_by_name_and_never_listed(stage):
    # a variant that was taken out of params.yaml leaves its folder: a listing would still count it
    assert not LISTINGS & calls(code(notebook_of(stage)))


def test_every_file_in_results_is_declared_by_a_stage():
    # DVC restores declared files only, and a variant that was taken out of params.yaml leaves its folder behind
    declared = {Path(out.fs_path) for stage in STAGES.values() for out in stage.outs}
    unknown = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "results").rglob("*")
        if file.is_file() and not file.name.startswith(".") and not declared & {file, *file.parents}
    }
    assert not unknown, f"declare them in dvc.yaml, or remove what a former stage left: {sorted(unknown)}"


# ---- is dvc.lock up to date: what CI asks --------------------------------------------------------------------------


def load_stale():
    spec = importlib.util.spec_from_file_location("stale", ROOT / ".ci" / "stale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stale


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param({}, [], id="up-to-date"),
        pytest.param(
            {"s": [{"changed deps": {"weights": "deleted"}}, {"changed outs": {"a": "not in cache", "b": "deleted"}}]},
            [],
            id="a-checkout-without-the-cache",
        ),
        pytest.param(
            {
                "run": [{"changed outs": {"runs/a/weights": "not in cache"}}],
                "s": [{"changed deps": {"runs": "modified"}}],
            },
            [],
            id="a-folder-without-what-lies-in-the-cache",
        ),
        pytest.param({"s": [{"changed deps": {"runs": "modified"}}]}, ["s: changed deps: runs modified"], id="folder"),
        pytest.param({"s": ["changed command"]}, ["s: changed command"], id="command"),
        pytest.param(
            {
                "s": [{"changed deps": {"params.yaml": {"blocks": "modified"}}}],
                "t": [{"changed deps": {"x.py": "new"}}],
            },
            ["s: changed deps: params.yaml, blocks modified", "t: changed deps: x.py new"],
            id="parameters-and-code",
        ),
        pytest.param(
            {"s": [{"changed outs": {"m.json": "modified"}}]}, ["s: changed outs: m.json modified"], id="edit"
        ),
    ],
)
def test_a_stale_lock_is_told_from_a_missing_cache(status, expected):
    assert load_stale()(status) == expected


def test_stale_understands_what_dvc_says(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    repo = Repo.init(tmp_path, no_scm=True)
    (tmp_path / "params.yaml").write_text("blocks: {n: 1}\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a:\n    cmd: echo 1 > weights\n    params: [blocks]\n    outs: [weights]\n"
        "  b:\n    cmd: cp weights m.json\n    deps: [weights]\n    metrics: [m.json: {cache: false}]\n"
    )
    repo.reproduce()
    stale = load_stale()
    assert stale(Repo(tmp_path).status()) == []
    (tmp_path / "weights").unlink()
    assert stale(Repo(tmp_path).status()) == []
    (tmp_path / "m.json").write_text("edited")
    (tmp_path / "params.yaml").write_text("blocks: {n: 2}\n")
    assert [line.partition(":")[0] for line in stale(Repo(tmp_path).status())] == ["a", "b"]
