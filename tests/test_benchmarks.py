"The programs of benchmarks/: their arithmetic on made-up sides, and each of them once, on a model that takes seconds."
import json, os, runpy, shlex, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1]/"benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from helpers.forks import FORKS
from harness import alternate, compare, report, run_side, summary
import forecast, gpu, harness, table, task, training

TOY = ("--size", "toy", "--block-size", "32", "--batch", "2", "--text", "python-docs", "--tokenizer", "tiny",
       "--device", "cpu")


def python(code): return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"]


def runs(*values): return [dict(value=v) for v in values]


def test_a_summary_is_the_median_and_the_spread():
    assert summary([3, 1, 2, 10]).to_dict() == dict(median=2.5, least=1, most=10, runs=4)


def test_ratios_are_taken_pair_by_pair():
    "A machine that turns four times slower in the second round changes both sides, and no ratio."
    row = compare("speed", dict(ours=runs(300, 75, 330), peer=runs(100, 25, 100)), "value", "peer")
    assert (row.ours.median, row.peer.median) == (300, 100)
    assert (row.ratio.median, row.ratio.least, row.ratio.most) == (3, 3, 3.3)
    assert row.reached is None
    with pytest.raises(ValueError): compare("speed", dict(ours=runs(1), peer=runs(1, 2)), "value", "peer")


@pytest.mark.parametrize("rule, target, ours, reached", [
    ("at least", 3.0, 30, True), ("at least", 3.0, 29.9, False),
    ("at most", 0.55, 5.5, True), ("at most", 0.55, 5.51, False),
    ("within", 0.05, 10.4, True), ("within", 0.05, 9.6, True),
    ("within", 0.05, 9.4, False), ("within", 0.05, 10.6, False)])
def test_a_target_is_reached_or_not(rule, target, ours, reached):
    sides = dict(ours=runs(ours), peer=runs(10))
    assert compare("figure", sides, lambda run: run["value"], "peer", target=(rule, target)).reached is reached


def test_sides_run_in_turn_with_nothing_left_by_the_one_before(tmp_path):
    order = tmp_path/"order"
    def side(label): return python(f"""import os, pathlib
from harness import emit
folders = pathlib.Path(), pathlib.Path(os.environ['XDG_CACHE_HOME'])
left = [p for folder in folders for p in folder.iterdir() if p.name not in ('out', 'err')]
pathlib.Path('file').write_text('x')
open({str(order)!r}, 'a').write({label!r})
print('not JSON')
emit(left=len(left), label={label!r}, hidden=os.environ.get('HIDDEN'))""")
    results = alternate(dict(a=side("a"), b=side("b")), rounds=2, env=dict(b=dict(HIDDEN="yes")))
    assert order.read_text() == "abab"
    found = {label: [(run["label"], run["left"], run["hidden"]) for run in results[label]] for label in "ab"}
    assert found == dict(a=[("a", 0, None)] * 2, b=[("b", 0, "yes")] * 2)
    assert all(run["seconds"] > 0 and run["peak_bytes"] > 1e6 for label in "ab" for run in results[label])


NO_JSON = "did not end with a line of JSON"


@pytest.mark.parametrize("code, words", [
    ("sys.exit('the disk is full')", "ended with 1:\nthe disk is full"), ("print('half a line')", "half a line"),
    ("print([1])", NO_JSON), ("", NO_JSON)])
def test_a_side_that_fails_says_why(code, words):
    with pytest.raises(RuntimeError) as e: run_side(python(code))
    assert words in str(e.value)


def test_memory_of_a_side_and_of_its_children():
    hold = "x = bytearray(60_000_000); time.sleep(0.6)"
    run = run_side(python(f"""import subprocess, time
from harness import emit
child = subprocess.Popen([sys.executable, '-c', 'import time; {hold}'])
{hold}
child.wait()
emit()"""), tree=True)
    assert 60e6 < run["peak_bytes"] < 115e6 < run["tree_peak_bytes"] < 230e6


def test_no_result_names_a_folder_of_the_machine(tmp_path, monkeypatch):
    "A folder of another place is left out; ../shared may be a link to one."
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"shared").symlink_to(tmp_path/"elsewhere")
    monkeypatch.setattr(harness, "ROOT", tmp_path/"checkout")
    program, text = tmp_path/"checkout"/"benchmarks"/"x.py", tmp_path/"elsewhere"/"a.txt"
    said = harness.typed([sys.executable, program, "--text", text, "/b/c.txt"])
    assert said == "python benchmarks/x.py --text ../shared/a.txt c.txt"
    for path in (BENCHMARKS/"results").glob("*.json"):
        kept = json.loads(path.read_text())
        for command in (kept["command"], *kept["commands"].values()):
            assert not any(os.path.isabs(word) for word in shlex.split(command)), path


def test_a_report_can_be_read_back(tmp_path, capsys):
    results = dict(ours=runs(1, 2), peer=runs(4, 4))
    row = compare("peak memory", results, "value", "peer", target=("at most", 0.55))
    commands = dict(ours=[sys.executable, str(BENCHMARKS/"x.py")])
    path = report("a question", results, [row], commands=commands, folder=tmp_path, extra=float("nan"))
    kept = json.loads(path.read_text())
    assert {"question", "date", "command", "machine", "commands", "rows", "runs", "extra"} == set(kept)
    facts = {"device", "cpu", "cores", "ram", "gpu", "system", "versions", "revision", "environment"}
    assert set(kept["machine"]) == facts
    assert {"python", "torch", "transformers", "colab-gpt2"} <= set(kept["machine"]["versions"])
    assert kept["runs"] == results and kept["commands"]["ours"] == "python benchmarks/x.py"
    assert kept["rows"][0]["reached"] is True
    assert table.row_from(kept["rows"][0]) == row
    assert path.name.startswith("a-question-") and "a question" in capsys.readouterr().out
    (device, results), = table.read_results(tmp_path).items()
    line = "| peak memory | 2 B | 4 B | peer | 0.375 | 0.25 to 0.5 | at most 0.55 | yes |"
    assert device == kept["machine"]["device"] and line in table.markdown(table.rows_of(results))


def test_options_become_the_words_of_a_side():
    given = dict(block_size=8, sides=["a", "b"], quick=True, slow=False, side=None, seed=0)
    assert " ".join(task.words(given)) == "--block-size 8 --sides a b --quick --seed 0"


def options(**changes): return SimpleNamespace(**{**dict(device="cpu", size="gpt2", no_bf16=False), **changes})


def measured(speed, memory, mfu=None):
    return dict(tokens_per_second=speed, peak_bytes=memory, gpu_peak_bytes=memory, mfu=mfu)


def training_rows(figures, **changes):
    "(figure, peer) -> Row of one run a side with these figures: label -> (tokens/s, bytes, MFU)."
    results = {label: [measured(*values)] for label, values in figures.items()}
    return {(row.figure, row.peer_label): row for row in training.rows_of(options(**changes), results)}


FIGURES = {"tutorial": (100, 8e9), "stock": (140, 6e9), "stock-compiled": (160, 6e9), "ours": (320, 5e9),
           "ours-single": (310, 4e9)}
SPEED, MEMORY = "training, tokens/s", "peak memory of training"
SINGLE_SPEED, SINGLE_MEMORY = "training one block a step, tokens/s", "peak memory of training one block a step"


def test_targets_of_training_are_against_the_tutorial_and_the_faster_stock_trainer():
    rows = training_rows(FIGURES)
    found = {at: (row.ratio.median, row.target, row.reached) for at, row in rows.items()}
    assert found[SPEED, "tutorial"] == (3.2, 3.0, True) and rows[MEMORY, "tutorial"].target is None
    assert found[SINGLE_MEMORY, "tutorial"] == (0.5, 0.55, True)
    assert found[SINGLE_SPEED, "tutorial"] == (3.1, 3.0, True)
    assert found[SINGLE_SPEED, "stock-compiled"] == (310 / 160, None, None)
    assert (SINGLE_SPEED, "stock") not in rows
    assert found[SPEED, "stock-compiled"] == (2.0, 2.0, True) and rows[SPEED, "stock"].target is None
    assert all(row.rule is None for row in training_rows(FIGURES, size="toy").values())
    rows = training_rows(FIGURES | {"trl": (125, 7e9), "nanogpt": (240, 5e9)}, no_bf16=True)
    assert {at: row.target for at, row in rows.items() if row.target} == {
        (SINGLE_SPEED, "tutorial"): 2.3, (SINGLE_SPEED, "trl"): 2.3, (SINGLE_SPEED, "nanogpt"): 1.25}


def test_targets_on_a_gpu_are_for_our_faster_side():
    rows = training_rows({"stock": (140, 4e9, 0.15), "stock-compiled": (160, 4e9, 0.17), "ours": (200, 4e9, 0.23),
                          "ours-compiled": (240, 4e9, 0.26)}, device="cuda")
    found = {at: (row.target, row.reached) for at, row in rows.items()}
    assert found["training compiled, tokens/s", "stock-compiled"] == (1.3, True)
    assert found[SPEED, "stock-compiled"] == (None, None)
    assert found["MFU, ours-compiled", "25%"] == (1.0, True) and found["MFU, ours", "25%"] == (None, None)


def test_a_side_that_fails_is_left_out_and_told(capsys):
    failed, seen = {}, []
    sides = dict(good=python("from harness import emit; emit(x=1)"), bad=python("import sys; sys.exit('no compiler')"))
    def count(results): seen.append({label: len(runs) for label, runs in results.items()})
    results = alternate(sides, rounds=2, failed=failed, each_round=count)
    assert seen == [dict(good=1), dict(good=2)] and list(results) == ["good"]
    nothing = alternate(dict(bad=sides["bad"]), rounds=1, failed={}, each_round=seen.append)
    assert nothing == {} and len(seen) == 2  # no report of nothing takes the place of one that was kept
    assert list(failed) == ["bad"] and "no compiler" in failed["bad"]
    assert "bad failed and is left out" in capsys.readouterr().err
    assert training.speed_or_none(sides["bad"], {}) is None


def forecast_run(**memory):
    return dict(planned=dict(peak_bytes=90, seconds_per_step=None), probed=dict(peak_bytes=103, seconds_per_step=1.2),
                seconds_per_step=1.0, **memory)


def test_a_forecast_is_compared_with_the_process_or_the_whole_gpu():
    rows = forecast.rows_of("gpt2", [forecast_run(peak_bytes=100)])
    assert [(row.figure, row.ratio.median, row.reached) for row in rows] == [
        ("peak memory of gpt2, forecast before", 0.9, False),
        ("peak memory of gpt2, forecast after the probe", 1.03, True),
        ("seconds a step of gpt2, forecast after the probe", 1.2, False)]
    on_gpu = forecast_run(peak_bytes=5000, gpu_peak_bytes=90, gpu_context_bytes=20, gpu_reserved_bytes=forecast.T4_CAP)
    assert [row.peer.median for row in forecast.rows_of("gpt2", [on_gpu])][:2] == [110, 110]
    rows = forecast.rows_of_t4("gpt2", [on_gpu])
    assert [row.reached for row in rows] == [False, False, True] and not any("seconds" in row.figure for row in rows)
    assert not forecast.rows_of_t4("gpt2", [{**on_gpu, "gpu_reserved_bytes": forecast.T4_CAP + 1}])[-1].reached


def run_program(shell, program, *words): return shell(sys.executable, BENCHMARKS/program, *words, timeout=500)


class ForkedSide:
    "In the place of subprocess.Popen: a program of benchmarks/ in a forked process, which has imported torch."
    def __init__(self, words, cwd, env, stdout, stderr):
        self.process = FORKS.Process(target=run_forked, args=(words[1:], cwd, env, stdout.name, stderr.name))
        self.process.start()

    def __enter__(self): return self

    def __exit__(self, *error):
        self.process.join()
        self.returncode = self.process.exitcode


def run_forked(words, cwd, env, *streams):
    for number, name in enumerate(streams, 1): os.dup2(os.open(name, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path = words, [str(BENCHMARKS), *sys.path]
    runpy.run_path(words[0], run_name="__main__")


@pytest.fixture
def end_to_end(monkeypatch, tmp_path, capsys):
    "Run a program with its sides in forked processes; -> a CompletedProcess."
    monkeypatch.setattr(harness, "subprocess", SimpleNamespace(Popen=ForkedSide, run=subprocess.run))
    monkeypatch.chdir(tmp_path)
    def run(program, *words):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS/program), *words])
        try: code = runpy.run_path(sys.argv[0], run_name="__main__") and 0
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        if isinstance(code, str): code, err = 1, err + code
        return subprocess.CompletedProcess(sys.argv, code, out, err)
    return run


def kept(tmp_path, question): return json.loads(next((tmp_path/"results").glob(f"{question}-*.json")).read_text())


def test_training_end_to_end(end_to_end, tmp_path):
    ran = end_to_end("training.py", *TOY, "--sides", "tutorial", "trl", "nanogpt", "stock", "ours-single",
                     "--micro-batches", "2", "--steps", "2", "--rounds", "1", "--results", "results")
    assert ran.returncode == 0, ran.stderr
    said = kept(tmp_path, "training")
    assert [(row["figure"], row["peer_label"]) for row in said["rows"]] == [
        *[(figure, peer) for peer in ("tutorial", "trl", "nanogpt")
          for figure in (SPEED, MEMORY, SINGLE_SPEED, SINGLE_MEMORY)],
        (SPEED, "stock"), (MEMORY, "stock"), (SINGLE_SPEED, "stock")]
    assert {row["target"] for row in said["rows"]} == {None}  # none was set for a toy
    first = {label: runs[0] for label, runs in said["runs"].items()}
    tokens = {label: run["tokens_per_step"] for label, run in first.items()}
    assert tokens == {"tutorial": 32, "trl": 32, "nanogpt": 32, "stock": 64, "ours-single": 32, "ours": 64}
    for run in first.values():
        assert run["tokens_per_second"] == pytest.approx(run["tokens_per_step"] / run["seconds_per_step"])
        assert 8 < run["training_loss"] < 10 and run["peak_bytes"] > 1e8  # ln(8192) = 9.01
    of = {label: (run["left_out"], len(run["step_seconds"])) for label, run in first.items()}
    # Blocks that ours learnt from before its first step; 12 blocks are left out in all, 4 and more count.
    probed = 3 * first["ours"]["plan"]["micro_batch"]
    assert of == {"tutorial": (12, 16), "trl": (12, 16), "nanogpt": (12, 16), "stock": (6, 8), "ours-single": (9, 16),
                  "ours": ((12 - probed) // 2, 8)}
    assert "tutorial" in ran.stdout and "round 1 of 1, ours" in ran.stderr


def test_equality_end_to_end(end_to_end, tmp_path):
    ran = end_to_end("equality.py", *TOY, "--precisions", "fp32", "--steps", "6", "--results", "results")
    assert ran.returncode == 0, ran.stderr
    said = kept(tmp_path, "equality")
    ours, stock = (said["runs"][f"{who}-fp32"][0]["losses"] for who in ("ours", "stock"))
    assert len(ours) == len(stock) == 6 and len(set(stock)) == 6
    assert ours == pytest.approx(stock, rel=1e-4)
    assert said["rows"][0]["figure"] == "loss at step 6, fp32" and said["rows"][0]["reached"]


def test_forecast_end_to_end(end_to_end, tmp_path):
    ran = end_to_end("forecast.py", *TOY, "--steps", "4", "--sizes", "toy", "toy:none", "--results", "results")
    assert ran.returncode == 1 and "toy:none failed" in ran.stderr and "invalid choice: 'none'" in ran.stderr
    said = kept(tmp_path, "forecast")
    assert [(row["figure"], row["target"]) for row in said["rows"]] == [
        ("peak memory of toy, forecast before", 0.05), ("peak memory of toy, forecast after the probe", 0.05),
        ("seconds a step of toy, forecast before", None), ("seconds a step of toy, forecast after the probe", 0.1)]
    assert said["runs"]["toy"][0]["plan_probed"]["source"] == "probe" and list(said["failed"]) == ["toy:none"]


def test_mfu_is_the_stated_formula():
    from transformers import GPT2Config
    tokens_per_second, peak = 100_000, 989e12  # of an H100
    flops_per_token = 6*(124_439_808 - 1024*768) + 12*12*768*1024
    found = task.model_flops_utilisation(GPT2Config(), 1024, tokens_per_second, peak)
    assert found == pytest.approx(tokens_per_second * flops_per_token / peak)


@pytest.mark.parametrize("program, words, said", [
    ("training.py", ("--text", "nowhere.txt"), "There is no nowhere.txt. Give --text a path, or python-docs."),
    ("training.py", ("--tokenizer", "none"), "There is no none. Give --tokenizer a path, or tiny."),
    ("training.py", ("--micro-batches", "2", "0"), "--micro-batches is 0; it must be a whole number ≥ 1."),
    ("packing.py", ("--rounds", "0"), "--rounds is 0; it must be a whole number ≥ 1."),
    ("forecast.py", ("--t4",), "--t4 rehearses a Tesla T4 on a larger CUDA GPU, and this would run on the CPU: "
                               "nothing was measured.")])
def test_what_cannot_be_measured_is_said_in_one_line(shell, tmp_path, program, words, said):
    ran = run_program(shell, program, *TOY, *words, "--results", "results")
    assert (ran.returncode, ran.stdout, ran.stderr.strip()) == (1, "", said)
    assert not (tmp_path/"results").exists()


def test_warming_up_is_counted_in_blocks():
    "As near to 12 blocks as whole steps come, what a probe learnt from among them; never no step at all."
    def left_out(blocks_per_step, done=0): return task.warm_up_steps(SimpleNamespace(warm_up=12), blocks_per_step, done)
    assert [left_out(n) for n in (1, 2, 4, 8, 100)] == [12, 6, 3, 2, 1]
    assert (left_out(1, done=3), left_out(4, done=3), left_out(4, done=24)) == (9, 2, 1)


def test_gpu_needs_a_gpu(shell):
    ran = shell(sys.executable, BENCHMARKS/"gpu.py", CUDA_VISIBLE_DEVICES="")
    assert (ran.returncode, ran.stdout) == (1, "")
    said = "There is no CUDA GPU here (torch.cuda.is_available() is False), so nothing was measured."
    assert ran.stderr.strip() == said


def test_the_first_quarter_of_an_hour_on_a_gpu_asks_what_no_other_machine_shows(tmp_path):
    options = gpu.parse(["--first", "--results", str(tmp_path)])
    asked = gpu.first_questions(options, tmp_path)
    assert list(asked) == list(gpu.FIRST_SHARES) and sum(gpu.FIRST_SHARES.values()) == pytest.approx(1)
    assert all((BENCHMARKS/program).exists() or program in ("-c", "-m") for program, _ in asked.values())
    _, (_, _, file, _, words) = asked["a recorded step"]
    assert f"def test_a_{words}_on_a_gpu(" in file.read_text()
    assert gpu.command(*asked["tiny in fp16"])[1:4] == ["-c", "from colab_gpt2.cli import main; main()", "finetune"]


def test_gpu_goes_on_after_a_failure_and_stops_in_time(tmp_path):
    fails, hangs, works = tmp_path/"fails.py", tmp_path/"hangs.py", tmp_path/"works.py"
    fails.write_text("import sys; sys.exit(3)")
    works.write_text("import sys; sys.exit(sys.argv[1:] != ['--steps', '2'])")
    hangs.write_text("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    started = time.monotonic()
    asked = {"a": (fails, {}), "b": (works, dict(steps=2)), "c": (hangs, {}), "d": (fails, {})}
    outcome = gpu.run_all(asked, 0.2, dict.fromkeys("abcd", 1))
    assert outcome["a"] == outcome["d"] == "failed with 3" and outcome["b"] == ""
    assert "stopped after" in outcome["c"]  # what hung took only its own share
    assert time.monotonic() - started < 30
    assert set(gpu.run_all(asked, 0, dict.fromkeys("abcd", 1)).values()) == {"skipped: the 0 minutes were over"}


def test_sampling_without_gpt2s_tokenizer_asks_of_tiny_alone(capsys):
    import sampling
    def models(tokenizer, device): return sampling.default_models(SimpleNamespace(tokenizer=tokenizer, device=device))
    assert models("tiny", "cuda") == ["tiny"] and "gpt2 is left out" in capsys.readouterr().err
    assert (models("gpt2-tokenizer", "cuda"), models("tiny", "cpu")) == (["tiny", "gpt2"], ["tiny"])


@pytest.mark.parametrize("title", gpu.questions(gpu.parse([])))
@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_gpu_asks_with_options_that_its_programs_take(shell, title, flags):
    program, given = gpu.questions(gpu.parse(flags))[title]
    helped = run_program(shell, program, *task.words(given), "--help")
    assert helped.returncode == 0, helped.stderr


def test_the_pages_show_what_was_measured():
    "results/README.md has all that is kept; README's table is a part of it, under the name of its machine."
    found = table.read_results()
    assert found
    # python benchmarks/table.py --page
    assert (table.RESULTS/"README.md").read_text(encoding="utf-8") == table.page(found)
    readme = (BENCHMARKS.parent/"README.md").read_text(encoding="utf-8")
    device, rows = next((device, table.rows_of(results)) for device, results in found.items())
    assert device.partition(",")[0] in readme
    head, _, *known = table.markdown(rows, table.SHORT).splitlines()
    shown = readme.partition(head)[2].strip().splitlines()
    shown = shown[1:shown.index("")]
    assert len(shown) >= 5 and not set(shown) - set(known)


def test_the_cost_of_a_mirror(end_to_end, tmp_path):
    "Stretches with a copy and without take turns in one run, and in the first kind something is copied."
    ran = end_to_end("mirror.py", *TOY, "--steps", "3", "--rounds", "2", "--warm-up", "2", "--rate", "50",
                      "--megabytes", "1", "--results", "results")
    assert ran.returncode == 0, ran.stderr
    said = kept(tmp_path, "mirror")
    assert [row["figure"] for row in said["rows"]] == ["training, tokens/s"] and said["rows"][0]["target"] is None
    assert [len(run["step_seconds"]) for runs in said["runs"].values() for run in runs] == [3] * 4
    assert all(run["megabytes"] > 0 for run in said["runs"]["mirror"])
