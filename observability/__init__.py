"""What a monitoring stack is given: rules of Prometheus, dashboards of Grafana."""
