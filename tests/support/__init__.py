"""What tests share: fakes, toys, oracles, processes."""
