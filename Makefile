# Two commands matter: `make quickstart` and `make test`. Both set up a virtual environment first, from nothing but Python.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell $(name) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,12))' 2>/dev/null && echo $(name))))
VENV := .venv
RUN := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test lint clean

$(VENV)/.ready: setup.py
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# Apart, as the test extra is large: it holds a compiler for TPUs.
$(VENV)/.ready-test: $(VENV)/.ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

quickstart: $(VENV)/.ready
	JAX_COMPILATION_CACHE_DIR=runs/.jax $(RUN) -m launch.sweep --config configs/distill/digits.py --sweep.seed=0,1,2 \
	  --workdir runs/quickstart --config.teacher.workdir=runs/quickstart/teacher
	$(RUN) -m launch.report runs/quickstart --output runs/quickstart/report.html --png runs/quickstart/report.png

test: $(VENV)/.ready-test lint
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-test
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) runs build *.egg-info
