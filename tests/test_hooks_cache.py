"""The cache is found under either of transformers' words for it."""

from dyrate_lib.hooks_cache import cache_name, cache_of


def test_either_word():
    cache = object()
    for word in ("past_key_values", "cache"):
        assert cache_of({word: cache, "use_cache": True}) is cache and cache_name({word: None}) == word
    assert cache_of({"use_cache": True}) is None and cache_name({}) == "past_key_values"
