"""The engine: span trees, transformer, caches, decoders and log-probabilities. Token ids in, token ids out."""

if __name__ != "hermesflow.engine":
    raise ImportError(
        "hermesflow's folder engine/ was imported as the top-level package 'engine'; import hermesflow.engine instead, "
        "and set PYTHONSAFEPATH=1 (or leave the repository root) when running python -m or python -c."
    )
