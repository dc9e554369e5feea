# The commands of the README. Everything else is in scripts/.
#
# ARGS is passed on: make run ARGS='--import ~/src --seed 7'

.DEFAULT_GOAL := help
.PHONY: help run test spdk run-spdk guest long bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## the demo on a file: no root, no huge pages, no SPDK
	@scripts/demo.sh file $(ARGS)

test: ## everything; installs what it needs where it may, SPDK included, and says what it skips
	@scripts/test.sh

spdk: ## get, verify, build and install SPDK, outside of this directory
	@scripts/spdk.sh install

run-spdk: ## the demo on an SPDK malloc bdev of 2 GiB; gets SPDK if it is missing, needs huge pages
	@scripts/demo.sh spdk $(ARGS)

guest: ## NVMe over PCIe and power cuts, in a QEMU guest with an emulated controller; needs SPDK, but no root
	@scripts/guest-tests.sh all $(ARGS)

long: ## the long forms of the randomised tests
	@scripts/long.sh $(ARGS)

bench: ## figures side by side with their peers; with SPDK if it is installed
	@scripts/bench.sh $(ARGS)
