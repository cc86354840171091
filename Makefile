PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= deploy/demo_model/tandem-demo

.PHONY: proto
proto: ## regenerate the gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto --pyi_out=proto proto/tandem/v1/worker.proto
