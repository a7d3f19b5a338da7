# The two commands of a stranger are `make demo` and `make test`. Everything is done by scripts/.
.PHONY: install check test demo bench soak lock clean
.DEFAULT_GOAL := install

install:  ## everything nestnet needs, in .venv and from the distribution; at once when nothing changed
	@scripts/install

check: install  ## formatting, types, import arrows
	@scripts/check

test: ## install, check, all tests
	@scripts/test

demo: install  ## three machines, two tenants, real packets
	@scripts/demo

bench: install  ## TCP through nestnet, through a Linux bridge with a kernel VXLAN device, and without an overlay
	@scripts/bench

soak: install  ## the random tests, for SOAK seconds (600)
	@scripts/soak

lock:  ## pin the requirements again
	@scripts/lock

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
