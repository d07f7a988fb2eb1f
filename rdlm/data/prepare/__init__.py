"""Making prepared data: finding and reading documents, tokenising, packing into shards."""
