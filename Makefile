# Every target sets itself up first: it needs `python3 python3-venv make` and nothing else, and makes
# its virtual environment in .venv. TORCH_INDEX=... names the index to take torch from.

demo: ## Start every role on this machine, ask the shipped model a question and an errand, end
	@tools/bootstrap.sh run
	@$(BIN)/expertmesh demo --client examples/errand.py

test: ## Run the tests: unit, ranks, conformance, and samples of the long matrix on a real cluster
	@tools/bootstrap.sh dev
	@$(PYTEST) -n 2 tests/unit clients/python/tests
	@$(PYTEST) -m "not gpu and not full" --durations=10 tests/conformance tests/ranks tests/cluster tests/chaos
	@$(PYTEST) -n 2 tests/helm

test-unit: ## Run the unit tests only: no process, no socket
	@tools/bootstrap.sh dev
	@$(PYTEST) -n 2 tests/unit clients/python/tests

test-full: ## Run the long matrix too
	@tools/bootstrap.sh dev
	@$(PYTEST) -m "not gpu" --durations=30

test-gpu: ## Run what needs one or two GPUs; fails where there is none
	@tools/bootstrap.sh dev
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no GPU here")'
	@$(PYTEST) -m gpu

lint: ## Check format, lint, types, layers, generated code, wire contracts and the Dockerfile
	@tools/bootstrap.sh dev
	@tools/lint.sh

format: ## Bring the code into its format
	@tools/bootstrap.sh dev
	@$(BIN)/ruff format && $(BIN)/ruff check --fix

pb: ## Generate cluster/pb and the client's copy from proto/
	@tools/bootstrap.sh dev
	@tools/generate_pb.sh

chart: ## Generate the chart's schema of values, its table and the goldens
	@tools/bootstrap.sh dev
	@$(BIN)/python -m tests.helm.regenerate

bench: ## Compare this engine with transformers, with and without expert workers
	@tools/bootstrap.sh dev
	@$(BIN)/python -m tests.bench.bench_engines

accept-demo: ## Measure the demo's time and memory; writes reports/demo.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.demo --json reports/demo.json

bench-placement: ## Compare placements with EPLB's and a lower bound: the tables of docs/placement.md
	@tools/bootstrap.sh dev
	@$(BIN)/python -m tests.bench.bench_placement

bench-autoscaler: ## Simulate days of load: worker-hours and late requests, beside simpler ways to scale
	@tools/bootstrap.sh dev
	@$(BIN)/python -m tests.bench.bench_autoscaler

accept-parity: ## Compare with transformers over the full matrix; writes reports/parity.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.parity --json reports/parity.json

accept-disconnect: ## Let clients vanish 1,000 times; writes reports/disconnect.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.disconnect --json reports/disconnect.json

accept-chaos: ## Kill, freeze, add and drain workers 550 times under load; writes reports/chaos-*.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos faults --json reports/chaos-1.json --plot reports/chaos-1.svg
	@$(BIN)/python -m tests.accept.chaos faults --gateways 2 --json reports/chaos-2.json

accept-head: ## Kill Ray's GCS 10 times under load, on RocksDB and on redis-server; writes reports/head-*.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.head_death --json reports/head-rocksdb.json
	@$(BIN)/python -m tests.accept.head_death --storage redis --json reports/head-redis.json

accept-fault-lab: ## Simulate 100,000 seeds and find every mutation; writes reports/fault-lab.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.fault_lab --json reports/fault-lab.json

accept-walk: ## Walk gateways x workers up and down under load; writes reports/walk.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos walk --json reports/walk.json

accept-last-copy: ## Kill the last copies of experts under load; writes reports/last-copy-*.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos last-copy --json reports/last-copy-2.json
	@$(BIN)/python -m tests.accept.chaos last-copy --floor 1 --standby 0 --count 300 \
		--json reports/last-copy-1.json

accept-controller: ## Kill the controller 50 times under load; writes reports/controller.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos controller --json reports/controller.json

accept-gateways: ## Kill ranks of gateways 200 times under load; writes reports/gateways-*.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos gateways --count 150 --json reports/gateways-1.json
	@$(BIN)/python -m tests.accept.chaos gateways --count 50 --tensor-parallel 2 --json reports/gateways-2.json

accept-frontdoors: ## Kill front doors, connections and gateways 250 times; writes reports/frontdoors.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.frontdoors --json reports/frontdoors.json

accept-mixed: ## Harm both planes at once for 20 minutes; writes reports/mixed.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chaos mixed --tensor-parallel 2 --minutes 20 --json reports/mixed.json

accept-cuts: ## Cut a host off under load, for 3 s and for longer (root); writes reports/cuts.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.cuts --json reports/cuts.json

accept-overhead: ## Measure what recovery costs while nothing fails; writes reports/overhead.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.bench.bench_recovery --json reports/overhead.json

accept-rollout: ## Replace every member of a cluster 10 times under load; writes reports/rollout.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.rollout --rounds 10 --json reports/rollout.json

accept-chart: ## Run the chart's containers as processes until they answer (root); writes reports/chart.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.chart --json reports/chart.json

accept-autoscale: ## Triple the load and let it fall, on Ray's own autoscaler; writes reports/autoscale.*
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.autoscale --json reports/autoscale.json \
		--plot reports/autoscale.svg

accept-rebalance: ## Move experts every few seconds under load; writes reports/rebalance.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.rebalance --json reports/rebalance.json

accept-gateway-death: ## Kill and drain gateways under load and at chosen tokens; writes reports/gateway-*.json
	@$(ACCEPT)
	@for size in 1 2; do \
		$(BIN)/python -m tests.accept.gateway_death load --tensor-parallel $$size \
			--json reports/gateway-death-$$size.json || exit 1; \
		$(BIN)/python -m tests.accept.gateway_death indices --tensor-parallel $$size --every 1 \
			--after reports/gateway-death-$$size.json --json reports/gateway-indices-$$size.json || exit 1; \
	done

accept-fault-points: ## Kill ranks of gateways at named points under load; writes reports/fault-points-*.json
	@$(ACCEPT)
	@for size in 1 2; do \
		$(BIN)/python -m tests.accept.fault_points --tensor-parallel $$size \
			--json reports/fault-points-$$size.json || exit 1; \
	done

accept-snapshot-cost: ## Measure what snapshots cost, and replay; writes reports/snapshot-cost.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.snapshot_cost --json reports/snapshot-cost.json \
		--plot reports/snapshot-cost.svg

accept-prefix-cache: ## Compare tokens with the prefix cache on and off; writes reports/prefix-cache.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.prefix_cache --json reports/prefix-cache.json

accept-long-context: ## Run 100,000 tokens in chunks and plot what decoding costs; writes reports/long-context.*
	@$(ACCEPT)
	@$(BIN)/python -m tests.accept.long_context --json reports/long-context.json \
		--plot reports/long-context.svg

accept-bench: ## As bench; writes reports/bench.json
	@$(ACCEPT)
	@$(BIN)/python -m tests.bench.bench_engines --json reports/bench.json

clean: ## Remove the virtual environment, caches and reports
	rm -rf .venv reports .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' Makefile

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
ACCEPT := tools/bootstrap.sh dev && mkdir -p reports
export TORCH_INDEX
# Two processes whose threads wait for each other by spinning stand still on two cores.
export OMP_NUM_THREADS := 1

.NOTPARALLEL:
.PHONY: demo test test-unit test-full test-gpu lint format pb chart bench \
	accept-demo accept-parity accept-disconnect accept-bench accept-chaos accept-walk \
	accept-last-copy accept-controller accept-head accept-fault-lab accept-gateway-death \
	accept-snapshot-cost accept-cuts accept-overhead accept-gateways accept-frontdoors accept-mixed \
	accept-rollout accept-chart accept-rebalance accept-autoscale accept-prefix-cache \
	accept-long-context accept-fault-points bench-placement bench-autoscaler clean help
