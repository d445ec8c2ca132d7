"""Training tomat on TPUs with Levanter, apart from the library: another Python, no torch."""
