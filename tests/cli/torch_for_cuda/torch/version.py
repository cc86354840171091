cuda: str | None = "13.0"
