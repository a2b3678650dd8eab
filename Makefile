.PHONY: setup format check test

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
