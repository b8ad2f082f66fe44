"""Settings: which source wins, what is refused and with which words, and that a config never changes.

Every refusal is one line that names the setting. CPU: pytest tests/test_config.py
"""

import dataclasses
import json

import pytest
from helpers import TINY, options, tiny_config

from loopgolf.errors import ConfigError
from train_gpt import RECIPES, SECTIONS, Config, Stored, count_code, help_text, parse_config

POCKET = ["--recipe", "pocket"]


def refuse(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(argv, environ or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_sources_win():
    default = {f.name: f.default for f in dataclasses.fields(Config)}["model_dim"]
    assert parse_config(["--recipe", "4b7l"], {})[0].model_dim == default
    config, source = parse_config(POCKET, {})
    assert (config.model_dim, source["model_dim"]) == (RECIPES["pocket"]["model_dim"], "recipe")
    config, source = parse_config(POCKET, {"MODEL_DIM": "512"})
    assert (config.model_dim, source["model_dim"]) == (512, "env")
    config, source = parse_config([*POCKET, "--model_dim", "768"], {"MODEL_DIM": "512"})
    assert (config.model_dim, source["model_dim"], source["seed"]) == (768, "cli", "default")


def test_a_recipe_can_come_from_the_environment():
    config, source = parse_config([], {"RECIPE": "4b7l"})
    assert (config.recipe, config.plan, source["recipe"]) == ("4b7l", "abcdabc", "env")
    assert parse_config(POCKET, {"RECIPE": "4b7l"})[0].recipe == "pocket"


def test_every_field_has_its_upper_case_name_in_the_environment():
    other = dict(SEED="7", ITERATIONS="3", MAX_WALLCLOCK_SECONDS="9.5", DATA_PATH="x y", RUN_ID="n", DRY_RUN="1")
    config, source = parse_config(POCKET, other)
    found = (config.seed, config.iterations, config.max_wallclock_seconds, config.data_path, config.run_id)
    assert found == (7, 3, 9.5, "x y", "n") and config.dry_run is True
    assert all(source[name.lower()] == "env" for name in other)


def test_every_value_has_a_source():
    _, source = parse_config(POCKET, {})
    assert set(source) == {f.name for f in dataclasses.fields(Config)}
    assert set(source.values()) == {"default", "recipe"} | ({"cli"} if source["recipe"] == "cli" else set())


def test_both_spellings_of_an_option():
    for argv in (["--seed", "42"], ["--seed=42"]):
        assert parse_config([*POCKET, *argv], {})[0].seed == 42
    config, _ = parse_config([*POCKET, "--matrix_lr=1e-3", "--vector_lr", "2.5E-4", "--seed=-3", "--data_path=a=b"], {})
    assert (config.matrix_lr, config.vector_lr, config.seed, config.data_path) == (1e-3, 2.5e-4, -3, "a=b")
    assert parse_config([*POCKET, "--seed", "-3"], {})[0].seed == -3
    assert parse_config([*POCKET, "--byte_limit=0", "--run_id="], {})[0].run_id == ""
    assert parse_config([*POCKET, "--seed=1", "--seed=2"], {})[0].seed == 2


@pytest.mark.parametrize("text, value", [("1", True), ("true", True), ("True", True), ("0", False), ("false", False)])
def test_booleans(text, value):
    assert parse_config([*POCKET, f"--smear={text}"], {})[0].smear is value
    assert parse_config([*POCKET, "--smear", text], {})[0].smear is value
    assert parse_config(POCKET, {"SMEAR": text})[0].smear is value


def test_a_bare_boolean_is_true_and_takes_nothing_with_it():
    config, _ = parse_config([*POCKET, "--dry_run", "--seed", "5"], {})
    assert config.dry_run is True and config.seed == 5
    assert parse_config([*POCKET, "--dry_run"], {})[0].dry_run is True


@pytest.mark.parametrize("argv, near", [
    (["--model_dmi", "64"], "model_dim"), (["--iteration=5"], "iterations"), (["--recipe", "pokcet"], "pocket"),
    (["--recipe", "4b71"], "4b7l"), ([*POCKET, "--score_mode=slidng"], "sliding"), ([*POCKET, "--average=sma"], "swa"),
    ([*POCKET, "--also=plain,averagd"], "averaged"), ([*POCKET, "--dtype=bfloat"], "bfloat16"),
])  # fmt: skip
def test_unknown_names_get_the_nearest_right_one(argv, near):
    assert near in refuse(argv).rpartition("did you mean")[2]


@pytest.mark.parametrize("argv, name", [
    (["--seed=x"], "seed"), (["--seed=1.5"], "seed"), (["--seed="], "seed"), (["--matrix_lr=fast"], "matrix_lr"),
    (["--matrix_lr=nan"], "matrix_lr"), (["--matrix_lr=inf"], "matrix_lr"), (["--smear=yes"], "smear"),
    (["--smear=2"], "smear"), (["--seed"], "seed"), (["--iterations=1e3"], "iterations"), (["seed=1"], "seed"),
    (["--", "x"], "--;"), (["-seed", "1"], "seed"), (["--seed", "1", "2"], "2"),
])  # fmt: skip
def test_wrong_values_name_their_setting(argv, name):
    assert name in refuse([*POCKET, *argv])


def test_wrong_values_in_the_environment_are_refused_too():
    assert "seed=x" in refuse(POCKET, {"SEED": "x"})
    assert "pokcet" in refuse([], {"RECIPE": "pokcet"})


@pytest.mark.parametrize("changes, names", [
    (dict(num_heads=3), ("model_dim", "num_heads")),
    (dict(num_heads=2, num_kv_heads=4), ("num_heads", "num_kv_heads")),
    (dict(bos_id=384), ("bos_id", "vocab_size")),
    (dict(rope_dims=3), ("rope_dims",)), (dict(rope_dims=18), ("rope_dims", "16")),
    (dict(batch_tokens=100), ("batch_tokens", "seq_len")), (dict(plan="a(b"), ("plan", "character 2")),
    (dict(plan="a(b)*r"), ("skips", "unet")), (dict(plan="(abcd)*200"), ("800", "512")),
    (dict(xsa_passes="9"), ("xsa_passes", "0 to 3")), (dict(ve_passes="last5"), ("ve_passes",)),
    (dict(ttt_freeze="z"), ("ttt_freeze", "z")), (dict(score_mode="best"), ("score_mode", "best")),
    (dict(skips="all"), ("skips",)), (dict(average="mean"), ("average",)), (dict(also="plain,x"), ("also", "x")),
    (dict(device="tpu"), ("device",)), (dict(dtype="float16"), ("dtype",)), (dict(compile="yes"), ("compile",)),
    (dict(model_dim=0), ("model_dim",)), (dict(num_heads=0), ("num_heads",)), (dict(vocab_size=1), ("vocab_size",)),
    (dict(num_kv_heads=0), ("num_kv_heads",)), (dict(seq_len=0), ("seq_len",)), (dict(depth=0), ("depth",)),
    (dict(core_bits=9), ("core_bits",)), (dict(edge_bits=1), ("edge_bits",)), (dict(stride=0), ("stride",)),
    (dict(stride=33), ("stride", "seq_len")), (dict(matrix_lr=-1.0), ("matrix_lr",)), (dict(ttt_lr=-1.0), ("ttt_lr",)),
    (dict(beta1=1.0), ("beta1",)), (dict(beta2=-0.1), ("beta2",)), (dict(momentum=-0.1), ("momentum",)),
    (dict(ttt_momentum=-5.0), ("ttt_momentum",)), (dict(weight_decay=-0.1), ("weight_decay",)),
    (dict(warmdown=1.5), ("warmdown",)), (dict(loop_start=-0.1), ("loop_start",)), (dict(softcap=-1.0), ("softcap",)),
    (dict(max_wallclock_seconds=0.0), ("max_wallclock_seconds",)), (dict(iterations=-1), ("iterations",)),
    (dict(ttt_chunk=0), ("ttt_chunk",)), (dict(score_batch=0), ("score_batch",)), (dict(log_every=0), ("log_every",)),
    (dict(micro_batch=-1), ("micro_batch",)), (dict(average_every=0), ("average_every",)),
    (dict(byte_limit=-5), ("byte_limit",)),
    (dict(bigram_buckets=-1), ("bigram_buckets",)), (dict(mlp_mult=0.0), ("mlp_mult",)),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, names):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_config_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().seed = 2


def test_an_artifact_stores_what_differs_from_the_defaults():
    config = tiny_config(seed=9)
    differs = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(Stored) if getattr(config, f.name) != f.default
    }
    assert config.stored() == differs and Config().stored() == {}
    assert "seed" not in config.stored() and "plan" in config.stored() and "score_mode" in config.stored()


def test_the_whole_help_explains_every_option_in_one_line():
    lines = help_text("all").splitlines()
    for field in dataclasses.fields(Config):
        (line,) = [line for line in lines if line.split()[:1] == [f"--{field.name}"]]
        assert len(line.split()) >= 4, line


def test_the_first_page_of_the_help_fits_a_screen_and_leads_to_the_others():
    page = help_text()
    assert len(page.splitlines()) <= 45 and "--recipe" in page and "--beta1" not in page
    for section in SECTIONS:
        assert f"--help {section}" in page and len(help_text(section).splitlines()) < 50
    assert "--beta1" in help_text("training") and "--plan" not in help_text("training")
    with pytest.raises(ConfigError, match="did you mean training"):
        help_text("trainig")


@pytest.fixture
def stored_run(tmp_path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    config = dataclasses.asdict(tiny_config(run_id="first", seed=5))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_resume_takes_the_config_of_the_run(stored_run):
    config, _ = parse_config(["--resume", str(stored_run)], {})
    assert (config.seed, config.plan, config.run_id, config.resume) == (5, TINY["plan"], "first", str(stored_run))
    same, _ = parse_config([f"--resume={stored_run}", "--seed=5", "--log_every=3"], {})
    assert same.seed == 5 and same.log_every == 3


def test_resume_with_another_value_is_refused(stored_run):
    assert "seed=6" in refuse([f"--resume={stored_run}", "--seed=6"])
    assert "matrix_lr" in refuse([f"--resume={stored_run}"], {"MATRIX_LR": "0.5"})
    assert "plan" in refuse([f"--resume={stored_run}", *options(plan="aaaa")])


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "{}", '{"seed": 1}'])
def test_resume_needs_a_readable_config(stored_run, content):
    path = stored_run / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert "resume" in refuse([f"--resume={stored_run}"])


@pytest.mark.parametrize("name, value", [("seed", "5"), ("plan", 3), ("model_dim", None), ("smear", "yes")])
def test_resume_refuses_a_damaged_config(stored_run, name, value):
    path = stored_run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refuse([f"--resume={stored_run}"])


def test_code_counts_as_packed_or_reserved_or_not_at_all():
    counted, free = Config(code_reserve=1000), Config(code_reserve=0)
    assert [count_code(counted, 0), count_code(counted, 900)] == [1000, 900]
    assert [count_code(free, 0), count_code(free, 900)] == [0, 0]
