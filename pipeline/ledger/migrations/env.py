"""Alembic's entry: runs the migrations on the connection that the ledger hands over."""

from alembic import context

from pipeline.ledger import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata(),
    render_as_batch=True,
    transactional_ddl=True,
    transaction_per_migration=True,  # one may then leave its own, to build an index concurrently
)
with context.begin_transaction():
    context.run_migrations()
