# The two commands of a stranger are `make demo` and `make test`. Everything is done by scripts/.
.PHONY: install check test demo bench bench-quick bench-scale soak lock clean
.DEFAULT_GOAL := install

install:  ## everything nestnet needs, in .venv and from the distribution; at once when nothing changed
	@scripts/install

check: install  ## formatting, types, import arrows
	@scripts/check

test: ## install, check, all tests
	@scripts/test

demo: install  ## three machines, two tenants, real packets
	@scripts/demo

bench: install  ## all of docs/performance.md: nestnet beside its limit and its peers, about twenty minutes
	@scripts/bench --folder docs/performance

bench-quick: install  ## three rows of it in a minute: only shown
	@scripts/bench --quick

bench-scale: install  ## docs/scale.md: how many networks, machines and rows, some minutes
	@.venv/bin/python -m nestnet.bench.scale docs/scale.md

soak: install  ## the random tests, for SOAK seconds (600)
	@scripts/soak

lock:  ## pin the requirements again
	@scripts/lock

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
