# `make demo` and `make test` set up what they need: a virtual environment in .venv, with the versions of constraints-dev.txt.
PYTHON ?= python3
SOURCES := settings.ini setup.py pyproject.toml

.PHONY: demo test test-no-bf16 test-colab test-browser torture bench bench-distributed show sync clean

.venv/ready: $(SOURCES) constraints-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints-dev.txt -e '.[dev,peer,qlora]'
	touch $@

.venv-colab/ready: $(SOURCES) constraints-colab.txt
	$(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install -q -c constraints-colab.txt -e '.[dev]'
	touch $@

# For the tests in a browser: Jupyter's front ends into both environments, Debian's chromium onto this machine (as root).
.venv/browser: .venv/ready
	.venv/bin/python -m pip install -q -c constraints-dev.txt -e '.[browser]'
	touch $@

.venv-colab/browser: .venv-colab/ready
	.venv-colab/bin/python -m pip install -q -c constraints-colab.txt -e '.[browser]'
	touch $@

/usr/bin/chromium:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium fonts-dejavu-core fonts-noto-color-emoji > /dev/null

demo: .venv/ready
	.venv/bin/colab-gpt2 demo --overwrite-output-dir

# Four processes with a thread each: many small models gain nothing by more threads, and more processes than cores fill the waits.
test: .venv/ready
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest -n 4 --dist worksteal

# The same on a CPU without bfloat16, rehearsed on one that has it; `ISA=AVX2` rehearses an older one.
ISA ?= AVX512_CORE
test-no-bf16: .venv/ready
	ONEDNN_MAX_CPU_ISA=$(ISA) PYTHONPATH="$(CURDIR)/tests/no_bf16" OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest -n 4 --dist worksteal

# What depends on versions, on Colab's versions of everything but torch and Python: transformers, accelerate, datasets, huggingface_hub,
# IPython, ipykernel and ipywidgets differ, so the notebooks that import these run again, and the tests that work with them. The
# others test arithmetic, files and processes of our own, which are the same in both; the panels run with Colab's versions in the browser.
VERSIONED := $(addprefix tests/test_,notebooks.py loading.py hub.py decoding.py generation.py engine.py cli.py pump.py stub.py tutorial.py)

test-colab: .venv-colab/ready
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv-colab/bin:$$PATH" .venv-colab/bin/python -m pytest -n 4 --dist worksteal -m "not same" $(VERSIONED)

# The tutorial and its panels in three front ends, as a reader clicks through them; one after the other, since the times of clicks are measured.
test-browser: .venv/browser .venv-colab/browser | /usr/bin/chromium
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest tests/browser

# A hundred toy runs that are killed and started again, and a dozen of each peer: five minutes of two quiet cores.
torture: .venv/ready
	.venv/bin/python benchmarks/torture.py

# Every benchmark of a CPU, one after the other, on a machine that does nothing else; then the table of all results.
bench: .venv/ready
	failed=0; for question in training equality best packing sampling forecast mirror; do \
		.venv/bin/python benchmarks/$$question.py --device cpu || failed=1; done; \
	.venv/bin/python benchmarks/training.py --device cpu --no-bf16 --sides tutorial trl nanogpt ours-single || failed=1; \
	.venv/bin/python benchmarks/table.py --page || failed=1; exit $$failed

# Two processes that train one model, against one: losses, speed, memory, the packing of a text.
bench-distributed: .venv/ready
	.venv/bin/python benchmarks/distributed.py --device cpu

# After a change to a notebook: run it twice and keep what its cells show; `python tools/show.py NOTEBOOK` does it for one.
show: .venv/ready
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python tools/show.py

# Before a commit: clean the notebooks, of widgets too, export the package, bring links into step with settings.ini, make the README from nbs/index.ipynb and the map of the rooms.
sync: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh -c "nbdev_clean && python tools/strip_widgets.py && nbdev_export && python tools/kaggle.py && python tools/links.py && python tools/readme.py && python tools/rooms.py"

clean:
	rm -rf .venv .venv-colab build dist demo-output demo-output.tar.gz
