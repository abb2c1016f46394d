"""The control plane under load: lists over a large database, submissions at a fixed rate, event watchers."""
