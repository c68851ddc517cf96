"""Runs on several hosts: how processes find each other, notice a lost one, and agree."""
