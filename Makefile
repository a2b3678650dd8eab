.PHONY: setup format check test bench_gpu bench_gpu_more bench_gpu_quick bench_encoders_gpu bench_image_size_gpu \
	determinism_gpu multi_gpu cifar10_gpu cifar10_cpu compare_transformers

setup: # .typing shows type checkers the import names; the folders are called otherwise
	pip install -e '.[dev]'
	mkdir -p .typing/quarterlight
	ln -sfn ../../ssl .typing/quarterlight/ssl
	ln -sfn ../../finetune .typing/quarterlight/finetune

format:
	ruff format .
	ruff check --fix .

check:
	ruff check .
	ruff format --check .
	pyright

test:
	pytest -n auto --dist loadfile

# What needs a GPU. Nothing is fetched; RESULTS=folder puts the results elsewhere.
RESULTS ?= benchmarks/results
MONTH := $(shell date +%Y%m)
GPUS = $(shell nvidia-smi -L 2>/dev/null | wc -l)
DIGITS = --config configs/pretrain/digits.yaml --epochs null --steps 60 --optim.warmup_epochs null \
	--optim.warmup_steps 5 --precision no --log_every_steps 20 --data.train 'runs/multi_gpu/digits/train-*.tar'

define COMPARE_LOSSES
import json, sys
last = {path: [line for line in map(json.loads, open(path)) if "loss" in line][-1] for path in sys.argv[1:]}
for path, line in last.items():
    print(path, "step", line["step"], "loss", line["loss"])
steps, losses = ([line[key] for line in last.values()] for key in ("step", "loss"))
if len(set(steps)) > 1 or None in losses or not all(abs(loss - losses[0]) <= 1e-3 for loss in losses):
    sys.exit("error: the last losses differ by more than 0.001")
endef
export COMPARE_LOSSES

bench_gpu: # models, eager and compiled, beside transformers, from shards, profiles: the most wanted rows in ten minutes
	python benchmarks/bench_gpu.py --out $(RESULTS)/gpu_$(MONTH).md

bench_gpu_more: # the rest, and what failed: again as often as it says that the time is over
	python benchmarks/bench_gpu.py --out $(RESULTS)/gpu_$(MONTH).md --resume

bench_gpu_quick: # ViT-B and Swin-B without shards, transformers and CUDA graphs: a few minutes
	python benchmarks/bench_gpu.py --models vit_base,swin_base --contestants ours,cross,simmim \
		--variants eager,compiled --minutes 4 --out $(RESULTS)/gpu_quick_$(MONTH).md

bench_encoders_gpu: # step times and memory round by round beside transformers and dense timm models
	python benchmarks/bench_encoders.py --device cuda --models vit_small,vit_base,vit_large,swin_tiny,swin_base \
		--batch_size 128 --rounds 20 --out $(RESULTS)/encoders_gpu_$(MONTH).md

bench_image_size_gpu: # how the time of an image grows with its size, ViT-S and Swin-T
	python benchmarks/bench_image_size.py --device cuda --batch_sizes 288,72,32 \
		--out $(RESULTS)/image_size_gpu_$(MONTH).png

determinism_gpu: # one GPU: the same samples and losses for any number of workers, and after kills
	rm -rf runs/determinism_gpu
	python launch/shards.py digits runs/determinism_gpu/digits
	python benchmarks/determinism.py --train 'runs/determinism_gpu/digits/train-*.tar' --dir runs/determinism_gpu/runs \
		--processes 1

multi_gpu: # two, four or eight GPUs: one process, DDP and FSDP2 on digits; fails unless the last losses agree
	@test $(GPUS) -ge 2 || { echo "error: multi_gpu needs two or more GPUs, and nvidia-smi lists $(GPUS)"; exit 1; }
	rm -rf runs/multi_gpu
	python launch/shards.py digits runs/multi_gpu/digits
	accelerate launch --config_file configs/accelerate/gpu1.yaml launch/pretrain.py $(DIGITS) --run_dir runs/multi_gpu/one
	accelerate launch --config_file configs/accelerate/gpu8.yaml --num_processes $(GPUS) launch/pretrain.py $(DIGITS) \
		--run_dir runs/multi_gpu/ddp
	accelerate launch --config_file configs/accelerate/fsdp8.yaml --num_processes $(GPUS) launch/pretrain.py $(DIGITS) \
		--run_dir runs/multi_gpu/fsdp
	@python -c "$$COMPARE_LOSSES" $(patsubst %,runs/multi_gpu/%/metrics.jsonl,one ddp fsdp)

# CIFAR-10: what is learned, with the pages in benchmarks/results. Stopped targets go on where they were.
STORY = python benchmarks/cifar10.py --dir runs/cifar10_$*
cifar10_cpu cifar10_gpu: cifar10_%: shards/cifar10/dataset.json # two cores: three hours; one GPU: a day
	$(STORY) --scale $* --jobs $(if $(filter cpu,$*),2,4)
	$(STORY) --scale $* --page $(RESULTS)/cifar10_story_$*_$(MONTH).md

compare_transformers: shards/cifar10/dataset.json # the loss of ours and of transformers' ViTMAE on the same batches: half an hour
	python benchmarks/compare_transformers.py --out runs/compare_transformers

# Written last, so that an interrupted download goes on. From a folder: python launch/shards.py FOLDER shards/cifar10
shards/cifar10/dataset.json: # downloads CIFAR-10
	python launch/shards.py cifar10 $(@D)
