"""The paper's experiments by name, on a model that fits one GPU: settings only; every step is another stage's."""
